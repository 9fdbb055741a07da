# shellcheck shell=bash disable=SC2034
# What models of configs/models have in common. scripts/launch.sh reads this first; a model that differs says so in its own arguments, which come later and win.
SHARED_ARGS=(
  --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
  --lr-decay-style cosine --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
)
# Of a model that is another architecture with the same sizes: it sets these and then reads the file of that model.
ARCHITECTURE_ARGS=(--normalization RMSNorm --swiglu)
EXPERT_ARGS=(
  --moe-router-dtype fp32 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
  --moe-token-dispatcher-type alltoall --moe-grouped-gemm --moe-permute-fusion
)
# Megatron's own FP8 recipes are fastest with groups padded in the routing map.
EXPERT_STOCK_FP8_ARGS=(--moe-router-padding-for-quantization)
BYTE_VOCAB_ARGS=(--tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 256)
WORD_VOCAB_ARGS=(--tokenizer-type NullTokenizer --vocab-size 32000)

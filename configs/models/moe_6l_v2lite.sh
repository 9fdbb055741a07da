# shellcheck shell=bash disable=SC2034
# 6 layers with the experts of DeepSeek-V2-Lite: hidden 2048, 16 heads, 64 experts of 1408, top-6, sequence 4096, 32000 words. 3.6 B parameters, fits one H200.
# The speed benchmark: micro-batch 4, global batch 16 (4 microbatches on one GPU). Times swing with the routing: for timing give --moe-router-force-load-balancing.
MODEL_ARGS=(
  --num-layers 6
  --hidden-size 2048
  --num-attention-heads 16
  --seq-length 4096
  --max-position-embeddings 4096
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --position-embedding-type rope
  --untie-embeddings-and-output-weights
  --attention-dropout 0
  --hidden-dropout 0
  --num-experts 64
  --moe-router-topk 6
  --moe-ffn-hidden-size 1408
  --moe-router-dtype fp32
  --moe-router-load-balancing-type aux_loss
  --moe-aux-loss-coeff 1e-2
  --moe-token-dispatcher-type alltoall
  --moe-grouped-gemm
  --moe-permute-fusion
)
# Megatron's own FP8 recipes are fastest with groups padded in the routing map.
STOCK_FP8_ARGS=(--moe-router-padding-for-quantization)
BATCH_ARGS=(--micro-batch-size 4 --global-batch-size 16)
OPTIMIZER_ARGS=(--lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0)
VOCAB_ARGS=(--tokenizer-type NullTokenizer --vocab-size 32000)

# shellcheck shell=bash disable=SC2034
# 338 M parameters, 64 M of them at work on a token: 9 layers of hidden 768 and 12 heads of 64; the first with a SwiGLU of 2048, the others with 64 experts of
# 256, top-6, and a shared expert of 512. Sequence 2048. Every width is a multiple of 128.
# The loss runs: bytes of source text, 131072 tokens per step, so 800 steps are 105 M tokens.
MODEL_ARGS=(
  --num-layers 9
  --hidden-size 768
  --ffn-hidden-size 2048
  --num-attention-heads 12
  --seq-length 2048
  --max-position-embeddings 2048
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --position-embedding-type rope
  --untie-embeddings-and-output-weights
  --attention-dropout 0
  --hidden-dropout 0
  --num-experts 64
  --moe-layer-freq "([0]+[1]*8)"
  --moe-router-topk 6
  --moe-ffn-hidden-size 256
  --moe-shared-expert-intermediate-size 512
  --moe-router-dtype fp32
  --moe-router-load-balancing-type aux_loss
  --moe-aux-loss-coeff 1e-2
  --moe-z-loss-coeff 1e-3
  --moe-token-dispatcher-type alltoall
  --moe-grouped-gemm
  --moe-permute-fusion
)
STOCK_FP8_ARGS=(--moe-router-padding-for-quantization)
BATCH_ARGS=(--micro-batch-size 16 --global-batch-size 64)
OPTIMIZER_ARGS=(--lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0)
VOCAB_ARGS=(--tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 256)

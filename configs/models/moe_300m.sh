# shellcheck shell=bash disable=SC2034,SC2154
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
  "${ARCHITECTURE_ARGS[@]}"
  --num-experts 64
  --moe-layer-freq "([0]+[1]*8)"
  --moe-router-topk 6
  --moe-ffn-hidden-size 256
  --moe-shared-expert-intermediate-size 512
  "${EXPERT_ARGS[@]}"
  --moe-z-loss-coeff 1e-3
)
STOCK_FP8_ARGS=("${EXPERT_STOCK_FP8_ARGS[@]}")
BATCH_ARGS=(--micro-batch-size 16 --global-batch-size 64)
OPTIMIZER_ARGS=(--lr 6e-4 --min-lr 6e-5 --lr-warmup-fraction 0.05)
VOCAB_ARGS=("${BYTE_VOCAB_ARGS[@]}")

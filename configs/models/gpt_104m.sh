# shellcheck shell=bash disable=SC2034,SC2154
# 104 M parameters (102.8 M in 8 layers, 0.8 M in byte embedding and head): hidden 1024, SwiGLU 2816, 16 heads of 64, sequence 2048. Every width is a multiple of 128.
# The loss runs: bytes of source text, 131072 tokens per step, so 800 steps are 105 M tokens.
MODEL_ARGS=(
  --num-layers 8
  --hidden-size 1024
  --ffn-hidden-size 2816
  --num-attention-heads 16
  --seq-length 2048
  --max-position-embeddings 2048
  "${ARCHITECTURE_ARGS[@]}"
)
BATCH_ARGS=(--micro-batch-size 16 --global-batch-size 64)
OPTIMIZER_ARGS=(--lr 6e-4 --min-lr 6e-5 --lr-warmup-fraction 0.05)
VOCAB_ARGS=("${BYTE_VOCAB_ARGS[@]}")

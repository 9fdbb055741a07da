# shellcheck shell=bash disable=SC2034,SC2154
# 2 M parameters: smoke tests and checkpoint tests, seconds per run. Widths are multiples of 128, so that TP 2 works too.
MODEL_ARGS=(
  --num-layers 4
  --hidden-size 256
  --ffn-hidden-size 512
  --num-attention-heads 4
  --seq-length 256
  --max-position-embeddings 256
  "${ARCHITECTURE_ARGS[@]}"
)
BATCH_ARGS=(--micro-batch-size 2 --global-batch-size 8)
OPTIMIZER_ARGS=(--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2)
VOCAB_ARGS=("${BYTE_VOCAB_ARGS[@]}")

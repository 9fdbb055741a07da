# shellcheck shell=bash disable=SC2034,SC2154
# 4 M parameters, FOG-flash with heads of 128, as FP8 attention wants them: smoke tests and checkpoint tests. TP 2 works too.
MODEL_ARGS=(
  --num-layers 4
  --hidden-size 256
  --ffn-hidden-size 512
  --num-attention-heads 4
  --kv-channels 128
  --group-query-attention
  --num-query-groups 2
  --seq-length 256
  --max-position-embeddings 256
  --fog flash
  --rotary-base 500000
)
BATCH_ARGS=(--micro-batch-size 2 --global-batch-size 8)
OPTIMIZER_ARGS=(--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2)
VOCAB_ARGS=("${BYTE_VOCAB_ARGS[@]}")

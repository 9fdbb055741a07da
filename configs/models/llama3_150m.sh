# shellcheck shell=bash disable=SC2034,SC2154
# 158 M parameters, Llama3: hidden 1024, SwiGLU 4096, 8 heads of 128 with 4 key heads, sequence 2048, bytes for tokens. The reference of the loss runs of fog_150m.
MODEL_ARGS=(
  --num-layers 10
  --hidden-size 1024
  --ffn-hidden-size 4096
  --num-attention-heads 8
  --group-query-attention
  --num-query-groups 4
  --seq-length 2048
  --max-position-embeddings 2048
  "${ARCHITECTURE_ARGS[@]}"
  --rotary-base 500000
)
BATCH_ARGS=(--micro-batch-size 16 --global-batch-size 64)
OPTIMIZER_ARGS=(--lr 1e-3 --min-lr 1e-5 --lr-warmup-fraction 0.05)
VOCAB_ARGS=("${BYTE_VOCAB_ARGS[@]}")

# shellcheck shell=bash disable=SC2034,SC2154
# 8 of the 32 layers of a Llama3 8B: hidden 4096, SwiGLU 14336, 32 heads of 128 with 8 key heads, sequence 4096; 32000 words. 2.0 B parameters.
# The speed benchmark: micro-batch 2, global batch 8 (4 microbatches on one GPU).
MODEL_ARGS=(
  --num-layers 8
  --hidden-size 4096
  --ffn-hidden-size 14336
  --num-attention-heads 32
  --group-query-attention
  --num-query-groups 8
  --seq-length 4096
  --max-position-embeddings 4096
  "${ARCHITECTURE_ARGS[@]}"
  --rotary-base 500000
)
BATCH_ARGS=(--micro-batch-size 2 --global-batch-size 8)
OPTIMIZER_ARGS=(--lr 3e-4 --min-lr 3e-5 --lr-warmup-iters 2)
VOCAB_ARGS=("${WORD_VOCAB_ARGS[@]}")

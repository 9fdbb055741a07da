# shellcheck shell=bash disable=SC2034,SC2154
# 8 layers of a 7B: hidden 4096, SwiGLU 11008, 32 heads, sequence 4096, 32000 words. 1.9 B parameters, fits one H200 in every recipe.
# The speed benchmark: micro-batch 2, global batch 8 (4 microbatches on one GPU).
MODEL_ARGS=(
  --num-layers 8
  --hidden-size 4096
  --ffn-hidden-size 11008
  --num-attention-heads 32
  --seq-length 4096
  --max-position-embeddings 4096
  "${ARCHITECTURE_ARGS[@]}"
)
BATCH_ARGS=(--micro-batch-size 2 --global-batch-size 8)
OPTIMIZER_ARGS=(--lr 3e-4 --min-lr 3e-5 --lr-warmup-iters 2)
VOCAB_ARGS=("${WORD_VOCAB_ARGS[@]}")

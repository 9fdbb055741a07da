# shellcheck shell=bash disable=SC2034,SC2154
# 7 M parameters: smoke tests and checkpoint tests of MoE layers, seconds per run. 4 layers, 8 experts of 256, top-2.
MODEL_ARGS=(
  --num-layers 4
  --hidden-size 256
  --ffn-hidden-size 512
  --num-attention-heads 4
  --seq-length 256
  --max-position-embeddings 256
  "${LLAMA_ARGS[@]}"
  --num-experts 8
  --moe-router-topk 2
  --moe-ffn-hidden-size 256
  "${EXPERT_ARGS[@]}"
)
STOCK_FP8_ARGS=("${EXPERT_STOCK_FP8_ARGS[@]}")
BATCH_ARGS=(--micro-batch-size 2 --global-batch-size 8)
OPTIMIZER_ARGS=(--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2)
VOCAB_ARGS=("${BYTE_VOCAB_ARGS[@]}")

# shellcheck shell=bash disable=SC2034,SC2154
# 6 layers with the experts of DeepSeek-V2-Lite: hidden 2048, 16 heads, 64 experts of 1408, top-6, sequence 4096, 32000 words. 3.6 B parameters, fits one H200.
# The speed benchmark: micro-batch 4, global batch 16 (4 microbatches on one GPU). Times swing with the routing: for timing give --moe-router-force-load-balancing.
MODEL_ARGS=(
  --num-layers 6
  --hidden-size 2048
  --num-attention-heads 16
  --seq-length 4096
  --max-position-embeddings 4096
  "${ARCHITECTURE_ARGS[@]}"
  --num-experts 64
  --moe-router-topk 6
  --moe-ffn-hidden-size 1408
  "${EXPERT_ARGS[@]}"
)
STOCK_FP8_ARGS=("${EXPERT_STOCK_FP8_ARGS[@]}")
BATCH_ARGS=(--micro-batch-size 4 --global-batch-size 16)
OPTIMIZER_ARGS=(--lr 3e-4 --min-lr 3e-5 --lr-warmup-iters 2)
VOCAB_ARGS=("${WORD_VOCAB_ARGS[@]}")

# shellcheck shell=bash disable=SC2034,SC2154
# 8 M parameters, FOG-flash with experts: smoke tests and checkpoint tests. 4 layers, 8 GeLU experts of 384 = 1.5 x 256 (--ffn-width-factor), top-2.
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
  --num-experts 8
  --moe-router-topk 2
  --moe-ffn-hidden-size 256
  "${EXPERT_ARGS[@]}"
)
STOCK_FP8_ARGS=("${EXPERT_STOCK_FP8_ARGS[@]}")
BATCH_ARGS=(--micro-batch-size 2 --global-batch-size 8)
OPTIMIZER_ARGS=(--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2)
VOCAB_ARGS=("${BYTE_VOCAB_ARGS[@]}")

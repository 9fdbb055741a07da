# shellcheck shell=bash disable=SC2034,SC2154
# 158 M parameters: 10 of the 16 layers of the 390M model of FOG (arXiv 2505.20524), with bytes for tokens: hidden 1024, FFN 6144 without a gate (1.5 x 4096),
# 8 heads of 128 with 4 key heads, sequence 2048. FOG-flash; fog_max_150m is FOG-max. 131072 tokens per step.
MODEL_ARGS=(
  --num-layers 10
  --hidden-size 1024
  --ffn-hidden-size 4096
  --num-attention-heads 8
  --group-query-attention
  --num-query-groups 4
  --seq-length 2048
  --max-position-embeddings 2048
  --fog flash
  --rotary-base 500000
)
BATCH_ARGS=(--micro-batch-size 16 --global-batch-size 64)
OPTIMIZER_ARGS=(--lr 1e-3 --min-lr 1e-5 --lr-warmup-fraction 0.05)
VOCAB_ARGS=("${BYTE_VOCAB_ARGS[@]}")

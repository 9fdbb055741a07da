# shellcheck shell=bash disable=SC2034
# 104 M parameters (102.8 M in 8 layers, 0.8 M in byte embedding and head): hidden 1024, SwiGLU 2816, 16 heads of 64, sequence 2048. Every width is a multiple of 128.
# The loss runs: bytes of source text, 131072 tokens per step, so 800 steps are 105 M tokens.
MODEL_ARGS=(
  --num-layers 8
  --hidden-size 1024
  --ffn-hidden-size 2816
  --num-attention-heads 16
  --seq-length 2048
  --max-position-embeddings 2048
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --position-embedding-type rope
  --untie-embeddings-and-output-weights
  --attention-dropout 0
  --hidden-dropout 0
)
BATCH_ARGS=(--micro-batch-size 16 --global-batch-size 64)
OPTIMIZER_ARGS=(--lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0)
VOCAB_ARGS=(--tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 256)

# shellcheck shell=bash disable=SC2034
# 2 M parameters: smoke tests and checkpoint tests, seconds per run. Widths are multiples of 128, so that TP 2 works too.
MODEL_ARGS=(
  --num-layers 4
  --hidden-size 256
  --ffn-hidden-size 512
  --num-attention-heads 4
  --seq-length 256
  --max-position-embeddings 256
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --position-embedding-type rope
  --untie-embeddings-and-output-weights
  --attention-dropout 0
  --hidden-dropout 0
)
BATCH_ARGS=(--micro-batch-size 2 --global-batch-size 8)
OPTIMIZER_ARGS=(--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0)
VOCAB_ARGS=(--tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 256)

# shellcheck shell=bash disable=SC2034
# 158 M parameters: fog_150m as Llama3, with pre-norms and SwiGLU 4096. The reference of its loss runs.
MODEL_ARGS=(
  --num-layers 10
  --hidden-size 1024
  --ffn-hidden-size 4096
  --num-attention-heads 8
  --group-query-attention
  --num-query-groups 4
  --seq-length 2048
  --max-position-embeddings 2048
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --position-embedding-type rope
  --rotary-base 500000
  --untie-embeddings-and-output-weights
  --attention-dropout 0
  --hidden-dropout 0
)
BATCH_ARGS=(--micro-batch-size 16 --global-batch-size 64)
OPTIMIZER_ARGS=(--lr 1e-3 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0)
VOCAB_ARGS=(--tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 256)

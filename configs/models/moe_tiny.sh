# shellcheck shell=bash disable=SC2034,SC2154
# tiny with experts: 7 M parameters, smoke tests and checkpoint tests of MoE layers, seconds per run. 8 experts of 256, top-2.
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/tiny.sh"
MODEL_ARGS+=(--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 256 "${EXPERT_ARGS[@]}")
STOCK_FP8_ARGS=("${EXPERT_STOCK_FP8_ARGS[@]}")

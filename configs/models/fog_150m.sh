# shellcheck shell=bash disable=SC2034,SC2154
# llama3_150m as FOG-flash: 10 of the 16 layers of the 390M model of FOG (arXiv 2505.20524), with bytes for tokens. FFN 6144 without a gate (1.5 x 4096), sequence
# 2048, 131072 tokens per step, 158 M parameters. fog_max_150m is FOG-max.
ARCHITECTURE_ARGS=(--fog flash)
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/llama3_150m.sh"

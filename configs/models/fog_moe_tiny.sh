# shellcheck shell=bash disable=SC2034,SC2154
# moe_tiny as FOG-flash: 8 M parameters, 8 GeLU experts of 384 = 1.5 x 256 (--ffn-width-factor), top-2.
ARCHITECTURE_ARGS=(--fog flash --rotary-base 500000 --kv-channels 128 --group-query-attention --num-query-groups 2)
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/moe_tiny.sh"

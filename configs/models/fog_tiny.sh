# shellcheck shell=bash disable=SC2034,SC2154
# tiny as FOG-flash, with heads of 128, as FP8 attention wants them: 4 M parameters, smoke tests and checkpoint tests. TP 2 works too.
ARCHITECTURE_ARGS=(--fog flash --rotary-base 500000 --kv-channels 128 --group-query-attention --num-query-groups 2)
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/tiny.sh"

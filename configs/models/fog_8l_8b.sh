# shellcheck shell=bash disable=SC2034,SC2154
# llama3_8l_8b as FOG-flash: FFN 21504 without a gate (1.5 x 14336). fog_max_8l_8b is FOG-max.
ARCHITECTURE_ARGS=(--fog flash)
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/llama3_8l_8b.sh"

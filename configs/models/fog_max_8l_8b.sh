# shellcheck shell=bash
# fog_8l_8b as FOG-max: frozen RMSNorm on queries and keys, xIELU.
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/fog_8l_8b.sh"
MODEL_ARGS+=(--fog max)

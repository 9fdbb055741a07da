# shellcheck shell=bash
# fog_150m as FOG-max: frozen RMSNorm on queries and keys, xIELU.
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/fog_150m.sh"
MODEL_ARGS+=(--fog max)

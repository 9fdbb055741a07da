#!/usr/bin/env bash
# Megatron pretraining speed and peak memory of several recipes, one after another in one job (mock data, log every iteration, one process each).
#
#   scripts/bench_megatron.sh OUT_DIR [RECIPE...]
#   MODEL=dense_8l_7b STEPS=10 GPUS=1 scripts/bench_megatron.sh out bf16 tensorwise delayed blockwise moss
#
# Writes OUT_DIR/RECIPE.log, OUT_DIR/speed.csv and prints the table. EXTRA: more Megatron flags for every run.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: bench_megatron.sh OUT_DIR [RECIPE...]}
shift
[[ $# -gt 0 ]] || set -- bf16 tensorwise delayed blockwise moss
mkdir -p "$out"
read -r -a extra <<<"${EXTRA:-}"
logs=()
for recipe in "$@"; do
  log="$out/${recipe//[:,=\/]/_}.log"
  echo "== $recipe -> $log"
  status=0
  "$here/launch.sh" --model "${MODEL:-dense_8l_7b}" --recipe "$recipe" --gpus "${GPUS:-1}" --steps "${STEPS:-10}" -- "${extra[@]}" >"$log" 2>&1 || status=$?
  if [[ $status -ne 0 ]]; then
    tail -n 30 "$log" >&2
    echo "bench_megatron.sh: $recipe ended with status $status; its log is $log" >&2
    exit "$status"
  fi
  logs+=("$recipe=$log")
done
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" -m fp8_recipes.megatron.parse_log speed --csv "$out/speed.csv" "${logs[@]}"

#!/usr/bin/env bash
# Megatron pretraining speed and peak memory of several recipes, one after another in one job (mock data, log every iteration, one process each).
#
#   scripts/bench_megatron.sh OUT_DIR [RECIPE...]
#   MODEL=dense_8l_7b STEPS=10 GPUS=1 scripts/bench_megatron.sh out bf16 tensorwise delayed blockwise moss
#   MODEL=moe_6l_v2lite ROUNDS=2 scripts/bench_megatron.sh out "CUDA_DEVICE_MAX_CONNECTIONS=32 bf16 --moe-router-fusion" blockwise "fp8_flow_moe --moe-router-fusion"
#
# MODEL+RECIPE takes that model instead of $MODEL, so that architectures of one geometry meet in one job: llama3_8l_8b+bf16 fog_8l_8b+fog.
# ROUNDS=2 runs the whole list twice, one recipe after the other each time; a recipe named twice runs twice.
# "NAME=VALUE ... RECIPE FLAGS", one argument, gives that run environment and Megatron flags of its own; the table names the run by all of it.
# EXTRA: Megatron flags of every run.
# WARMUP (3): iterations left out at the start. PERIOD (1): iterations between two that do more work (metrics), whose cost the median alone would hide.
# The first run is the baseline and has to end well; a later one that does not is reported, the others go on, and the script ends with its status.
# Writes OUT_DIR/RECIPE.log (RECIPE.2.log, ... for later rounds), OUT_DIR/speed.csv and prints the table.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: bench_megatron.sh OUT_DIR [RECIPE...]}
shift
[[ $# -gt 0 ]] || set -- bf16 tensorwise delayed blockwise moss
mkdir -p "$out"
read -r -a extra <<<"${EXTRA:-}"
runs=() logs=() failed=0
declare -A times=()
for ((round = 1; round <= ${ROUNDS:-1}; round++)); do
  for asked in "$@"; do
    times[$asked]=$((${times[$asked]:-0} + 1))
    runs+=("$asked" "${times[$asked]}")
  done
done
set -- "${runs[@]}"
while [[ $# -gt 0 ]]; do
  name=$1 round=$2
  shift 2
  read -r -a words <<<"$name"
  own=()
  while [[ ${words[0]} =~ ^[A-Z][A-Z0-9_]*= ]]; do
    own+=("${words[0]}")
    words=("${words[@]:1}")
  done
  spec=${words[0]:?"bench_megatron.sh: no recipe in '$name'"} flags=("${words[@]:1}")
  [[ $round -gt 1 ]] && name="$name.$round"
  log="$out/${name//[:,=\/ ]/_}.log"
  echo "== $name -> $log"
  status=0 model=${MODEL:-dense_8l_7b}
  [[ $spec == *+* ]] && model=${spec%%+*} spec=${spec#*+}
  env "${own[@]}" "$here/launch.sh" --model "$model" --recipe "$spec" --gpus "${GPUS:-1}" --steps "${STEPS:-10}" \
    -- "${extra[@]}" "${flags[@]}" >"$log" 2>&1 || status=$?
  if [[ $status -ne 0 ]]; then
    tail -n 30 "$log" >&2
    echo "bench_megatron.sh: $name ended with status $status; its log is $log" >&2
    [[ ${#logs[@]} -gt 0 ]] || exit "$status"
    failed=$status
    continue
  fi
  logs+=("$name=$log")
done
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" -m fp8_recipes.megatron.parse_log speed --warmup "${WARMUP:-3}" --period "${PERIOD:-1}" \
  --csv "$out/speed.csv" "${logs[@]}"
exit "$failed"

#!/usr/bin/env bash
# Does the metric warn before the loss does? Trains architectures with FP8 attention at a learning rate that some of them do not bear, metrics and alarms on,
# each with a bf16 run of the same settings beside it, and draws all of them on one page.
#
#   scripts/divergence_megatron.sh OUT_DIR [MODEL+RECIPE[@LR]...]
#   LR=1.2e-3 EXTRA="--lr-decay-style constant" scripts/divergence_megatron.sh out llama3_150m+bf16 llama3_150m+fog llama3_150m+fog@1.8e-3 fog_150m+fog@1.8e-3
#   PARALLEL=6 CUDA_VISIBLE_DEVICES=0 scripts/divergence_megatron.sh out ...        # six runs at a time on GPU 0; 0,1: in turn (without it: one GPU a run)
#
# Same text, seed and data order for all. Makes OUT_DIR/text.bin from this machine's package sources unless DATA names a dataset prefix. Writes a folder
# OUT_DIR/MODEL_RECIPE for each run (with _LR, if the run has its own; loss.jsonl, metrics.jsonl, log) and OUT_DIR/report.html. INTERVAL: steps between
# measurements (10). A run that diverges and ends is part of the result: the others go on, and the page shows how far it came. EXTRA: more Megatron flags for
# every run.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: divergence_megatron.sh OUT_DIR [MODEL+RECIPE...]}
shift
[[ $# -gt 0 ]] || set -- llama3_150m+bf16 llama3_150m+fog fog_150m+bf16 fog_150m+fog
for run in "$@"; do
  [[ $run == *+* ]] || { echo "divergence_megatron.sh: '$run' is not MODEL+RECIPE, e.g. llama3_150m+fog" >&2; exit 2; }
done
mkdir -p "$out"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
parallel=${PARALLEL:-1}
IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((parallel - 1)))}"
data=${DATA:-}
if [[ -z "$data" ]]; then
  data="$out/text"
  [[ -f "$data.idx" ]] || "$python" -m fp8_recipes.data --out "$data" --max-mb "${TEXT_MB:-150}"
fi
read -r -a extra <<<"${EXTRA:-}"

# train MODEL RECIPE LR FOLDER INDEX. --no-check-for-nan-in-loss-and-grad: Megatron would end the run at the first NaN, before its loss is written.
train() {
  local model=$1 recipe=$2 lr=$3 folder=$4 index=$5
  rm -rf "$folder"
  mkdir -p "$folder"
  [[ $parallel -eq 1 ]] || export CUDA_VISIBLE_DEVICES=${gpus[index % ${#gpus[@]}]}
  MASTER_PORT=$((${MASTER_PORT:-29500} + index)) "$here/launch.sh" --model "$model" --recipe "$recipe" --steps "${STEPS:-400}" \
    --data "$data" --log "$folder/loss.jsonl" -- --seed "${SEED:-1234}" --data-cache-path "$folder/cache" --lr "$lr" \
    --fp8-metrics-interval "${INTERVAL:-10}" --fp8-metrics-log "$folder/metrics.jsonl" --no-check-for-nan-in-loss-and-grad "${extra[@]}" >"$folder/log" 2>&1
}

folders=() jobs=() names=() failed=0
collect() {
  for i in "${!jobs[@]}"; do
    wait "${jobs[$i]}" || { echo "divergence_megatron.sh: ${names[$i]} ended with status $?; the end of its log:" >&2; tail -n 5 "$out/${names[$i]}/log" >&2; failed=$((failed + 1)); }
  done
  jobs=() names=()
}
for run in "$@"; do
  model=${run%%+*} recipe=${run#*+} lr=${LR:-4e-3}
  [[ $recipe != *@* ]] || lr=${recipe#*@}
  recipe=${recipe%@*} name=${model}_${recipe//[:,=\/]/_}
  [[ $run != *@* ]] || name=${name}_$lr
  echo "== $run -> $out/$name"
  folders+=("$out/$name")
  train "$model" "$recipe" "$lr" "$out/$name" "${#jobs[@]}" &
  jobs+=($!)
  names+=("$name")
  [[ ${#jobs[@]} -lt $parallel ]] || collect
done
collect
found=()
for folder in "${folders[@]}"; do
  [[ -s "$folder/metrics.jsonl" ]] && found+=("$folder")
done
[[ ${#found[@]} -gt 0 ]] || { echo "divergence_megatron.sh: no run measured anything" >&2; exit 1; }
"$python" -m fp8_recipes.cli inspect "${found[@]}" --out "$out"
[[ $failed -eq 0 ]] || echo "divergence_megatron.sh: $failed of $# runs ended early; their logs are in $out" >&2

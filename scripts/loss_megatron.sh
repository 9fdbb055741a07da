#!/usr/bin/env bash
# Loss of several recipes on the same text, seed and data order; the first recipe is the baseline.
#
#   scripts/loss_megatron.sh OUT_DIR [RECIPE...]
#   MODEL=gpt_104m STEPS=800 TEXT_MB=150 scripts/loss_megatron.sh out bf16 moss tensorwise
#   PARALLEL=2 scripts/loss_megatron.sh out bf16 moss tensorwise      # all at once, in turn on two GPUs (of CUDA_VISIBLE_DEVICES, if that is set)
#   START=300 scripts/loss_megatron.sh out bf16 moss tensorwise       # the first recipe leaves a checkpoint at step 300, the others continue from it
#
# Small models scatter by most of a percent from scratch, two bf16 runs included; from a common start a band of 0.25 % can be measured (docs/benchmarks.md).
# Makes OUT_DIR/text.bin from this machine's package sources unless DATA names a dataset prefix. Its tokens are bytes, as the models of the loss runs expect;
# VOCAB=32000: byte pairs, that many, whether made here or in DATA. ROOTS="/usr /opt": text from there instead. Writes OUT_DIR/RECIPE.jsonl and .log, then
# OUT_DIR/loss.csv, loss_summary.csv and loss.png. A recipe whose RECIPE.jsonl has all STEPS already is not run again. EXTRA: more Megatron flags for every run.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: loss_megatron.sh OUT_DIR [RECIPE...]}
shift
[[ $# -gt 0 ]] || set -- bf16 moss tensorwise
mkdir -p "$out"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
steps=${STEPS:-800}
start=${START:-}
parallel=${PARALLEL:-}
IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((${parallel:-1} - 1)))}"
[[ ${parallel:-1} -le ${#gpus[@]} ]] || { echo "loss_megatron.sh: PARALLEL=$parallel, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has ${#gpus[@]} GPUs" >&2; exit 2; }
data=${DATA:-}
if [[ -z "$data" ]]; then
  data="$out/text"
  read -r -a roots <<<"${ROOTS:+--roots $ROOTS}"
  [[ -f "$data.idx" ]] || "$python" -m fp8_recipes.data --out "$data" --max-mb "${TEXT_MB:-150}" --vocab "${VOCAB:-257}" "${roots[@]}"
fi
read -r -a extra <<<"${EXTRA:-}"
[[ -z "${VOCAB:-}" ]] || extra=(--vocab-size "$VOCAB" --null-tokenizer-eod-id $((VOCAB - 1)) "${extra[@]}")

# train RECIPE NAME [Megatron flags...]: every run builds its own index cache, so that parallel runs do not write the same files.
train() {
  local recipe=$1 name=$2 status=0
  shift 2
  "$here/launch.sh" --model "${MODEL:-gpt_104m}" --recipe "$recipe" --gpus "${GPUS:-1}" --steps "$steps" --data "$data" --log "$out/$name.jsonl" \
    -- --seed "${SEED:-1234}" --data-cache-path "$out/cache/$name" "${extra[@]}" "$@" >"$out/$name.log" 2>&1 || status=$?
  if [[ $status -ne 0 ]]; then
    tail -n 30 "$out/$name.log" >&2
    echo "loss_megatron.sh: $recipe ended with status $status; its log is $out/$name.log" >&2
  fi
  return "$status"
}

baseline=$1 checkpoint=$out/start_checkpoint
started() { [[ -f "$checkpoint/latest_checkpointed_iteration.txt" ]]; }  # written last: a start that was killed is made again
# prepare NAME: sets options, and NAME.jsonl to the steps before the run begins. With START the baseline leaves a checkpoint there as it passes.
prepare() {
  options=()
  if [[ -n "$start" ]] && started; then
    options=(--ckpt-format torch_dist --load "$checkpoint" --ckpt-step "$start")
    head -n "$start" "$out/${baseline//[:,=\/]/_}.jsonl" >"$out/$1.jsonl.start"
    mv "$out/$1.jsonl.start" "$out/$1.jsonl"
  else
    rm -f "$out/$1.jsonl"
    [[ -z "$start" ]] || options=(--ckpt-format torch_dist --save-interval "$start" --save "$checkpoint")
  fi
}

logs=() jobs=() index=0
for recipe in "$@"; do
  name=${recipe//[:,=\/]/_}
  logs+=("$recipe=$out/$name.jsonl")
  if [[ -f "$out/$name.jsonl" && $(wc -l <"$out/$name.jsonl") -eq $steps ]]; then
    echo "== $recipe: $out/$name.jsonl has all $steps steps"
    continue
  fi
  while [[ -n "$start" && "$recipe" != "$baseline" ]] && ! started; do  # in parallel: until the baseline has come so far
    if [[ ${#jobs[@]} -eq 0 ]] || ! kill -0 "${jobs[0]}" 2>/dev/null; then
      echo "loss_megatron.sh: no checkpoint of $baseline at step $start in $checkpoint" >&2
      exit 1
    fi
    sleep 1
  done
  echo "== $recipe -> $out/$name.jsonl"
  prepare "$name"
  if [[ -n "$parallel" ]]; then
    CUDA_VISIBLE_DEVICES=${gpus[index % parallel]} MASTER_PORT=$((${MASTER_PORT:-29500} + index)) train "$recipe" "$name" "${options[@]}" &
    jobs+=($!)
    index=$((index + 1))
  else
    train "$recipe" "$name" "${options[@]}"
  fi
done
for job in "${jobs[@]}"; do
  wait "$job"
done
"$python" -m fp8_recipes.megatron.parse_log loss --csv "$out/loss.csv" --png "$out/loss.png" "${logs[@]}"

#!/usr/bin/env bash
# Checkpoints: a run resumed from its own checkpoint has the same losses, bit for bit; a checkpoint loads into bf16 and back.
#
#   scripts/resume_megatron.sh OUT_DIR [RECIPE]
#   GPUS=2 EXTRA="--tensor-model-parallel-size 2 --sequence-parallel" scripts/resume_megatron.sh out moss
#
# through: 20 steps, checkpoint at 10.   resumed: 10 -> 20 from it, compared exactly.   into_bf16: 10 -> 20 in bf16.   back: 20 -> 30 with the recipe again.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: resume_megatron.sh OUT_DIR [RECIPE]}
recipe=${2:-moss}
mkdir -p "$out"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
# Bitwise comparison needs bitwise repeatable products and attention outside FP8 too.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=0
python=${PYTHON:-python3}
data=${DATA:-}
if [[ -z "$data" ]]; then
  data="$out/text"
  [[ -f "$data.idx" ]] || "$python" -m fp8_recipes.data --out "$data" --max-mb "${TEXT_MB:-8}"
fi
read -r -a extra <<<"${EXTRA:-}"

# train NAME RECIPE STEPS [Megatron flags...]: the schedule ends at step 30 in every run, so that runs of different length see the same learning rates.
train() {
  local name=$1 with=$2 steps=$3 status=0
  shift 3
  rm -f "$out/$name.jsonl"
  echo "== $name ($with, to step $steps)"
  "$here/launch.sh" --model "${MODEL:-tiny}" --recipe "$with" --gpus "${GPUS:-1}" --steps 30 --data "$data" --log "$out/$name.jsonl" \
    -- --exit-interval "$steps" --ckpt-format torch_dist --data-cache-path "$out/cache" "$@" "${extra[@]}" >"$out/$name.log" 2>&1 || status=$?
  if [[ $status -ne 0 ]]; then
    tail -n 30 "$out/$name.log" >&2
    echo "resume_megatron.sh: $name ended with status $status; its log is $out/$name.log" >&2
    exit "$status"
  fi
}

# checkpoint_10 NAME: a directory holding only the checkpoint of step 10 of run "through".
checkpoint_10() {
  rm -rf "${out:?}/$1"
  mkdir -p "$out/$1"
  cp -r "$out/through/iter_0000010" "$out/$1/"
  echo 10 >"$out/$1/latest_checkpointed_iteration.txt"
}

rm -rf "$out/through"
train through "$recipe" 20 --save "$out/through" --save-interval 10
checkpoint_10 resumed
train resumed "$recipe" 20 --load "$out/resumed"
checkpoint_10 into_bf16
train into_bf16 bf16 20 --load "$out/into_bf16" --save "$out/into_bf16" --save-interval 10
train back "$recipe" 30 --load "$out/into_bf16"
"$python" -m fp8_recipes.megatron.parse_log same --from-step 11 "$out/through.jsonl" "$out/resumed.jsonl"
"$python" -m fp8_recipes.megatron.parse_log near --from-step 11 --tolerance 0.02 "$out/through.jsonl" "$out/into_bf16.jsonl"
"$python" -m fp8_recipes.megatron.parse_log steps --expect 21-30 "$out/back.jsonl"

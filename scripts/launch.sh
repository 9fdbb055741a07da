#!/usr/bin/env bash
# Train a model of configs/models with a recipe, through torchrun and fp8_recipes.pretrain_gpt.
#
#   scripts/launch.sh --model gpt_104m --recipe moss --data data/text --steps 800
#   scripts/launch.sh --model dense_8l_7b --recipe tensorwise --steps 10 --dry-run
#   scripts/launch.sh --model tiny --recipe moss --gpus 2 --steps 20 -- --tensor-model-parallel-size 2 --sequence-parallel
#
# --recipe   moss, moss:interval=200, a YAML file, ... or Megatron's tensorwise, delayed, blockwise; bf16 for none
# --data     dataset prefix from "python -m fp8_recipes.data"; without it Megatron's mock data
# --gpus     processes on this node (default 1)
# --log      JSON-lines file, one line per iteration
# --profile  Chrome trace (.json) of the GPU's work in one iteration of rank 0, with a report of where the time goes (scripts/profile_megatron.py)
# --dry-run  print the command and do not run it
# --         everything after it goes to Megatron unchanged
# Environment: PYTHON (default python3), MASTER_PORT (default 29500); multi-node: NNODES, NODE_RANK, MASTER_ADDR.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=tiny recipe=bf16 data="" gpus=1 steps=20 log="" profile="" dry_run=false
usage() { sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }
need() { [[ $# -ge 2 ]] || { echo "launch.sh: $1 needs a value" >&2; exit 2; }; }
while [[ $# -gt 0 ]]; do
  case "$1" in
    --model) need "$@"; model=$2; shift 2 ;;
    --recipe) need "$@"; recipe=$2; shift 2 ;;
    --data) need "$@"; data=$2; shift 2 ;;
    --gpus) need "$@"; gpus=$2; shift 2 ;;
    --steps) need "$@"; steps=$2; shift 2 ;;
    --log) need "$@"; log=$2; shift 2 ;;
    --profile) need "$@"; profile=$2; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "launch.sh: unknown option '$1' (Megatron's own flags go after --)" >&2; exit 2 ;;
  esac
done

config="$root/configs/models/$model.sh"
if [[ ! -f "$config" ]]; then
  known=$(cd "$root/configs/models" && printf '%s ' *.sh)
  echo "launch.sh: no model '$model'; known: ${known//.sh/}" >&2
  exit 2
fi
MODEL_ARGS=() BATCH_ARGS=() OPTIMIZER_ARGS=() VOCAB_ARGS=() STOCK_FP8_ARGS=()
# shellcheck source=configs/shared.sh
source "$root/configs/shared.sh"
# shellcheck source=/dev/null
source "$config"

case "$recipe" in
  bf16) recipe_args=(--fp8-recipe bf16) ;;
  delayed | tensorwise) recipe_args=(--fp8-recipe "$recipe" --fp8-format hybrid "${STOCK_FP8_ARGS[@]}") ;;
  blockwise) recipe_args=(--fp8-recipe "$recipe" --fp8-format e4m3 "${STOCK_FP8_ARGS[@]}") ;;
  *) recipe_args=(--fp8-recipe "$recipe") ;;
esac
if [[ -n "$data" ]]; then
  data_args=(--data-path "$data" --split "99,1,0")
else
  data_args=(--mock-data)
fi
log_args=(--log-interval 1 --eval-iters 0)
[[ -n "$log" ]] && log_args+=(--fp8-log "$log")

entry=(-m fp8_recipes.pretrain_gpt)
if [[ -n "$profile" ]]; then
  entry=("$root/scripts/profile_megatron.py")
  export FP8_RECIPES_PROFILE=$profile
fi

# One hardware queue keeps Megatron's communication ahead of the products that wait for it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
command=(
  "${PYTHON:-python3}" -m torch.distributed.run --nproc-per-node "$gpus"
  --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}"
  "${entry[@]}"
  "${SHARED_ARGS[@]}" "${MODEL_ARGS[@]}" "${BATCH_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${VOCAB_ARGS[@]}"
  --bf16 --transformer-impl transformer_engine --use-distributed-optimizer --attention-backend auto --no-create-attention-mask-in-dataloader
  --train-iters "$steps"
  "${recipe_args[@]}" "${data_args[@]}" "${log_args[@]}" "$@"
)
if $dry_run; then
  printf 'CUDA_DEVICE_MAX_CONNECTIONS=%s PYTHONPATH=%q' "$CUDA_DEVICE_MAX_CONNECTIONS" "$PYTHONPATH"
  [[ -z "$profile" ]] || printf ' FP8_RECIPES_PROFILE=%q' "$profile"
  printf ' %q' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"

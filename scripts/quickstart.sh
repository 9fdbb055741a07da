#!/usr/bin/env bash
# Trains a small GPT in high precision and with the moss recipe, and compares: bash scripts/quickstart.sh [options of `fp8-recipes demo`]
# Makes .venv, installs this package there, writes runs/quickstart. Needs a Python (3.10 or newer) and, unless it already holds torch, a package index for pip.
#   TORCH=torch==2.13.0    the torch to install
#   VENV=.venv             where to install
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch_requirement=${TORCH:-torch==2.13.0}
venv=${VENV:-.venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { echo "quickstart: $*"; }

# True if $1 (an absolute path) finds every module that follows; asked outside of this folder, whose sources would count as installed.
has_modules() (
    local python=$1
    shift
    cd / && "$python" -c 'import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))' "$@"
)

in_virtual_environment() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; }

cuda_torch() { has_modules "$1" torch && "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

# The torch version pip would install for $1: "2.13.0+cpu" where the machine offers a CPU build. Downloads metadata only.
offered_torch() {
    local report
    report=$(mktemp)
    if "$1" -m pip install -qq --dry-run --ignore-installed --no-deps --report "$report" "$torch_requirement" 2>/dev/null; then
        "$1" -c 'import json, sys; print(json.load(open(sys.argv[1]))["install"][0]["metadata"]["version"])' "$report"
    fi
    rm -f "$report"
}

gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    gpu=yes
    say "GPU: $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
else
    say "GPU: none seen by nvidia-smi, so the demo runs the reference numerics on the CPU"
fi

pythons=$(bash scripts/find_python.sh 3.10)
python="" why="" reuse=no
while read -r path version; do
    if [[ $gpu == yes ]] && cuda_torch "$path"; then
        python=$path why="Python $version, whose torch sees the GPU: reused" reuse=yes
        break
    elif [[ $gpu == no ]] && has_modules "$path" torch; then
        python=$path why="Python $version, which already holds torch: reused" reuse=yes
        break
    fi
done <<<"$pythons"
if [[ -z $python && $gpu == no && ! -x $venv/bin/python ]]; then
    while read -r path version; do
        if has_modules "$path" ensurepip && offered=$(offered_torch "$path") && [[ $offered == *+cpu* ]]; then
            python=$path why="Python $version, for which pip offers a small CPU build of torch ($offered)"
            break
        fi
    done <<<"$pythons"
fi
if [[ -z $python ]]; then
    while read -r path version; do
        if has_modules "$path" ensurepip; then
            python=$path why="Python $version, the preferred of those found"
            break
        fi
    done <<<"$pythons"
    if [[ -z $python ]]; then
        echo "quickstart: no Python found can make a virtual environment (no ensurepip); apt-get install python3-venv, or pyenv install 3.12" >&2
        exit 1
    fi
    if [[ $gpu == no && ! -x $venv/bin/python ]]; then
        say "torch: pip offers no CPU build here, so this installs the CUDA build (several GB); PIP_EXTRA_INDEX_URL can name an index of CPU builds"
    fi
fi

if [[ $venv == /* ]]; then
    py=$venv/bin/python
else
    py=$PWD/$venv/bin/python
fi
if [[ -x $py ]]; then
    say "environment: $venv, made before ($("$py" --version)); delete it to start over"
elif [[ $reuse == yes ]] && in_virtual_environment "$python"; then
    say "python: $python ($why)"
    say "environment: the virtual environment of that Python, which is active and holds torch; none is made"
    py=$python
else
    say "python: $python ($why)"
    options=()
    if [[ $reuse == yes ]]; then
        options+=(--system-site-packages)
        if has_modules "$python" pip; then
            options+=(--without-pip) # the environment sees that one, and a Python without ensurepip will do
        fi
    fi
    "$python" -m venv "${options[@]}" "$venv"
    say "environment: $venv${options[*]:+ (${options[*]})}"
fi

needed=(torch numpy rich matplotlib)
if [[ $gpu == yes ]]; then
    needed+=(triton)
fi
if has_modules "$py" "${needed[@]}" fp8_recipes; then
    say "packages: all there"
elif has_modules "$py" "${needed[@]}"; then
    # Everything but this package: no index is needed, which matters on a GPU node that reaches none.
    if has_modules "$py" pip setuptools && "$py" -m pip install -qq --no-deps --no-build-isolation --no-index -e .; then
        say "packages: all there; this one was installed without an index"
    else
        say "packages: all there, but this one could not be installed without an index; running it from the source tree (PYTHONPATH)"
        export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    fi
else
    say "packages: installing with pip (a minute or a few; only errors are shown)"
    if ! has_modules "$py" torch; then
        "$py" -m pip install -qq "$torch_requirement"
    fi
    "$py" -m pip install -qq -e ".[demo]"
fi

say "running: fp8-recipes demo --out runs/quickstart $*"
exec "$py" -m fp8_recipes.cli demo --out runs/quickstart "$@"

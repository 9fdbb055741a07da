#!/usr/bin/env bash
# Lists the usable Pythons, the preferred one first, one "PATH VERSION" a line:
#   scripts/find_python.sh [MINIMUM]        MINIMUM defaults to 3.10
# Looks on PATH and under pyenv ($PYENV_ROOT, ~/.pyenv). Prefers 3.12 and 3.13, which Megatron-Core supports and every dependency has wheels for.
# Exits with 1 and a sentence when there is none.
set -euo pipefail

minimum=${1:-3.10}
preference=(3.12 3.13 3.14 3.11 3.10)

candidates() {
    local version root
    for version in "${preference[@]}"; do
        type -aP "python$version" || true
    done
    type -aP python3 || true
    type -aP python || true
    for root in "${PYENV_ROOT:-}" "$HOME/.pyenv"; do
        if [[ -n $root && -d $root/versions ]]; then
            find "$root/versions" -mindepth 3 -maxdepth 3 -path '*/bin/python3' | sort
        fi
    done
}

# Resolves shims and links to the interpreter itself; a pyenv shim whose version is not selected fails and is left out.
probe='
import os, sys, sysconfig
minimum = tuple(int(part) for part in sys.argv[1].split("."))
if sys.version_info[:2] >= minimum and sysconfig.get_config_var("Py_GIL_DISABLED") != 1:
    import venv
    print("%d.%d" % sys.version_info[:2], os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix else sys.executable, sys.version.split()[0])
'

declare -A seen=()
found=()
while IFS= read -r candidate; do
    # Broken interpreters are what this loop sorts out; their complaints are not the user's.
    if line=$("$candidate" -c "$probe" "$minimum" 2>/dev/null) && [[ -n $line && -z ${seen[$line]:-} ]]; then
        seen[$line]=1
        found+=("$line")
    fi
done < <(candidates)

if [[ ${#found[@]} -eq 0 ]]; then
    echo "find_python: no Python $minimum or newer on PATH or under pyenv; install one (apt-get install python3 python3-venv, or pyenv install 3.12)" >&2
    exit 1
fi

for version in "${preference[@]}"; do
    for line in "${found[@]}"; do
        read -r short path full <<<"$line"
        if [[ $short == "$version" ]]; then
            echo "$path $full"
        fi
    done
done

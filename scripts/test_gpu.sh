#!/usr/bin/env bash
# Every test that needs a GPU, several processes side by side on the GPUs of this machine: bash scripts/test_gpu.sh [--help]
# PYTHON (default python3) names the interpreter that has torch, TransformerEngine and Megatron-Core.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_tests.py" "$@"

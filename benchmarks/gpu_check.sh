#!/usr/bin/env bash
# Does the meter work on a GPU?   bash benchmarks/gpu_check.sh FOLDER
# Takes under five minutes on one GPU and needs torch of 2.11 or later and nothing else; nothing is installed.
# FOLDER gets gpu_check.md for people and gpu_check.json. PYTHON names another interpreter than python3.
set -euo pipefail
folder=${1:?usage: bash benchmarks/gpu_check.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$folder"

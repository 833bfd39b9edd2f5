#!/usr/bin/env bash
# Fine-tune on this machine, on all of its GPUs or on its CPU; goes on from the last checkpoint of the same output_dir.
#   launch/local.sh CONFIG [key=value ...]
#   ACCELERATE_CONFIG=configs/accelerate/fsdp2.yaml launch/local.sh configs/train/qwen3_30b_a3b.yaml
# VENV: the virtual environment to use, .venv if unset.
set -euo pipefail
if [ $# -eq 0 ]; then
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
gpus=$("$bin/python" -c 'import torch; print(torch.accelerator.device_count())')
flags=()
if [ -z "${ACCELERATE_CONFIG:-}" ]; then
    case $gpus in
        0) ACCELERATE_CONFIG=configs/accelerate/cpu.yaml ;;
        1) ACCELERATE_CONFIG=configs/accelerate/single_gpu.yaml ;;
        *) ACCELERATE_CONFIG=configs/accelerate/multi_gpu.yaml flags=(--num_processes "$gpus") ;;
    esac
fi
exec "$bin/python" -m training.train "$@" resume_from_checkpoint=auto --accelerate-config "$ACCELERATE_CONFIG" "${flags[@]}"

#!/usr/bin/env bash
# The checks that need a GPU (about ten minutes on one 80 GB card): the tests marked gpu, then a 3B policy update.
#   bash scripts/gpu_checks.sh [--dry-run]     writes outputs/gpu_checks/; or prints the commands
# PYTHON=python3 for another interpreter than that of .venv; SHAPE=tiny for a rehearsal on a small card.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python} out=outputs/gpu_checks failed=0 dry=0
[ "${1:-}" = --dry-run ] && dry=1
run() { # NAME COMMAND...
  echo "== $1: ${*:2}"
  [ "$dry" = 1 ] && return
  "${@:2}" 2>&1 | tee "$out/$1.txt" || failed=1
}
update() { run "$1" "$python" -m benchmarks.policy_update --shape "${SHAPE:-qwen2.5-3b}" "${@:2}"; }
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
if [ $dry = 0 ]; then
  mkdir -p "$out"
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/device.txt"
  "$python" -c 'import torch; assert torch.cuda.is_available(), "torch finds no CUDA device"' || exit 2
fi
run tests "$python" -m pytest -m gpu
update update
update update_unshared --unshared
update update_sdpa --kernel sdpa
update update_padded --padded
update update_kept_activations --no_checkpointing --max_tokens 8192
update update_optimizer_offload --optimizer_offload --steps 1
update update_param_offload --param_offload --steps 1
if [ $dry = 0 ]; then
  echo "== last lines"
  tail -qn 1 "$out"/update*.txt
fi
exit $failed

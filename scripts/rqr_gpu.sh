#!/usr/bin/env bash
# RQR as published, on one node with 8 GPUs:  bash scripts/rqr_gpu.sh 1.5b | 7b   (STACKEXCHANGE=DIR: shards of HuggingFaceH4/stack-exchange-preferences)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
py=.venv/bin/python
$py -m data_preprocess.stackexchange --input "${STACKEXCHANGE:?set STACKEXCHANGE to the folder of the parquet shards}" --output data/stackexchange
$py -m retriever_server.index bm25 --collection data/stackexchange/collection.jsonl --output data/indexes/bm25_stackexchange
$py -m convsearch.grpo experiment=rqr_qwen2.5-"${1:-1.5b}"

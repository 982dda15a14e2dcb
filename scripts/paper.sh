#!/usr/bin/env bash
# One experiment of the paper (ConvSearch-R1), from raw data to the table, on one node with 8 GPUs:
#   bash scripts/paper.sh DATASET MODEL RETRIEVER [--dry-run] [STAGE ...]     topiocqa|qrecc qwen|llama ance|bm25
# Stages and variables: scripts/run.sh. The authors' scripts on TopiOCQA: GRPO="actor_rollout_ref.rollout.n=16".
exec bash "$(dirname "$0")/run.sh" "paper_${1:?DATASET}_${2:?MODEL}_${3:?RETRIEVER}" "${@:4}"

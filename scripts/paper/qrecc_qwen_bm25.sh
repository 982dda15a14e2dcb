#!/usr/bin/env bash
# ConvSearch-R1's Qwen2.5-3B on QReCC with BM25, both stages, inference and evaluation; stages and variables: scripts/reproduce.sh
dataset=qrecc model=qwen retriever=bm25 exec bash "$(dirname "${BASH_SOURCE[0]}")/../reproduce.sh" "$@"

#!/usr/bin/env bash
# ConvSearch-R1's Llama-3.2-3B on QReCC with BM25, both stages, inference and evaluation; stages and variables: scripts/reproduce.sh
dataset=qrecc model=llama retriever=bm25 exec bash "$(dirname "${BASH_SOURCE[0]}")/../reproduce.sh" "$@"

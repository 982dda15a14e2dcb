#!/usr/bin/env bash
# ConvSearch-R1's Qwen2.5-3B on QReCC with ANCE, both stages, inference and evaluation; stages and variables: scripts/reproduce.sh
dataset=qrecc model=qwen retriever=ance exec bash "$(dirname "${BASH_SOURCE[0]}")/../reproduce.sh" "$@"

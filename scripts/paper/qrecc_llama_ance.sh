#!/usr/bin/env bash
# ConvSearch-R1's Llama-3.2-3B on QReCC with ANCE, both stages, inference and evaluation; stages and variables: scripts/reproduce.sh
dataset=qrecc model=llama retriever=ance exec bash "$(dirname "${BASH_SOURCE[0]}")/../reproduce.sh" "$@"

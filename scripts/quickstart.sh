#!/usr/bin/env bash
# The main job on its embedded default: a language model of 135M parameters and 10,033 Wikipedia summaries, both from
# Python packages, and the conversations of assets/demo. Makes .venv, trains both stages on the CPU, prints one table.
#   QUICK=1 bash scripts/quickstart.sh     a smoke run of every stage       SEED=2 ...     another seed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh # PYTHON is the interpreter that makes .venv; the runner takes the one of .venv
exec env -u PYTHON bash scripts/run.sh demo_smollm2 "$@"

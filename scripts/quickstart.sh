#!/usr/bin/env bash
# The main job on its embedded default: a real 135M-parameter language model and 10,033 Wikipedia summaries that travel inside packages, and the
# conversations of assets/demo. Sets up .venv, trains both stages on the CPU, prints one table. Run again, it keeps what is done.
#   QUICK=1 bash scripts/quickstart.sh     a smoke run of every stage       SEED=2 ...     another seed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
exec bash scripts/job_cpu.sh demo_smollm2

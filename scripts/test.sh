#!/usr/bin/env bash
# All checks: lint, types, the fast tier (under a minute), then the slow tier (whole jobs, real models, kill -9).
#   bash scripts/test.sh fast      lint, types and the fast tier alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo PATH="$PWD/.venv/bin:$PATH"
unset RETRIEVER_URL
ruff check .
ruff format --check .
mypy
pytest -m "not slow" -n 2 --dist loadfile
[ "${1:-}" = fast ] || pytest -m slow

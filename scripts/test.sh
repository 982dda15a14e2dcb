#!/usr/bin/env bash
# All checks: lint, types, the fast tier (under a minute), then the slow tier (whole jobs, real models, kill -9).
#   bash scripts/test.sh fast      lint, types and the fast tier alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
# verl and TRL, the oracles of the losses, in a folder of their own: they ask for older versions of what is pinned here.
oracles=.venv/oracles-$(sha256sum < tests/requirements-oracles.txt | cut -c1-16)
if [ ! -f "$oracles" ]; then
  echo "installing the oracles verl and TRL into .venv/oracles (0.3 GB) ..."
  rm -rf .venv/oracles .venv/oracles-*
  .venv/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --only-binary :all: --target .venv/oracles -r tests/requirements-oracles.txt \
    2> >(grep -v WARNING >&2 || true)
  touch "$oracles"
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo PATH="$PWD/.venv/bin:$PATH"
unset RETRIEVER_URL
ruff check .
ruff format --check .
mypy
pytest -m "not slow" -n 2 --dist loadfile
[ "${1:-}" = fast ] || pytest -m slow

#!/usr/bin/env bash
# All checks: lint, types, the fast tier (under a minute), then the slow tier (whole jobs, real models, kill -9).
#   bash scripts/test.sh fast      only lint, types and the fast tier
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
# Each list has its own folder, because it needs other versions than this project: verl and TRL for the losses, Lucene
# for BM25, Ray and vLLM for the cluster, playwright for the pages, schemathesis for the server.
for name in oracles lucene vllm browser fuzz; do
  stamp=.venv/$name-$(sha256sum < tests/requirements-$name.txt | cut -c1-16)
  [ -f "$stamp" ] && continue
  # .[gpu] installs its own vLLM.
  [ $name = vllm ] && .venv/bin/python -c 'import importlib.util as u; exit(u.find_spec("vllm") is None)' && continue
  echo "installing what tests/requirements-$name.txt lists into .venv/$name ..."
  rm -rf .venv/$name .venv/$name-*
  .venv/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
    --target .venv/$name -r tests/requirements-$name.txt 2> >(grep -v WARNING >&2 || true)
  touch "$stamp"
done
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo PATH="$PWD/.venv/bin:$PATH"
unset RETRIEVER_URL
ruff check .
ruff format --check .
mypy
pytest -rfEs -m "not slow" -n 2 --dist loadfile # -rfEs: every failure and skip with its reason at the end
[ "${1:-}" != fast ] || exit 0
pytest -rfEs -m "slow and not alone" -n 2 --dist loadfile
pytest -rfEs -m "slow and alone"

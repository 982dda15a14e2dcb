#!/usr/bin/env bash
# Makes .venv with everything that the embedded default and the tests need. Does nothing if .venv is up to date.
#   PYTHON=python3.12 bash scripts/install.sh     another interpreter (3.11 or 3.12)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
stamp=.venv/installed-$(cat requirements.lock pyproject.toml scripts/install.sh | sha256sum | cut -c1-16)
if [ -f "$stamp" ]; then exit 0; fi
"$python" - <<'PY' || { echo "error: $python is not Python 3.11 or 3.12; set PYTHON=/path/to/python3.11" >&2; exit 2; }
import sys
sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PY
echo "installing into .venv (about 2 GB, 2 to 4 minutes) ..."
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --upgrade pip 2> >(grep -v WARNING >&2 || true)
# torch first, at its exact version: a range would install gigabytes of CUDA packages on a CPU machine.
"${pip[@]}" install torch==2.13.0 2> >(grep -v WARNING >&2 || true)
# --no-deps: the lock has every package, and the package of the summaries requires a voice assistant that is not used.
"${pip[@]}" install --no-deps -r requirements.lock 2> >(grep -v WARNING >&2 || true)
"${pip[@]}" install --no-deps -e . 2> >(grep -v WARNING >&2 || true)
rm -f .venv/installed-*
touch "$stamp"

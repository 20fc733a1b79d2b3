#!/usr/bin/env bash
# Sets up the environment if needed, and builds the site. A warning is an error.
#
#   bash tools/docs.sh
#   bash tools/docs.sh -E       # arguments go to sphinx-build; -E builds all pages again
#
# PYTHON and VENV are explained in tools/setup_env.sh.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
export VENV
bash "$ROOT/tools/setup_env.sh"

"$VENV/bin/python" -m sphinx -b html -W --keep-going -q "$@" "$ROOT/docs" "$ROOT/docs/_build/html"
echo "the site: $ROOT/docs/_build/html/index.html"

#!/usr/bin/env bash
# Sets up the environment if needed, checks the style, and runs the tests. Arguments go to pytest.
#
#   bash tools/test.sh                  # everything but the slow tests
#   bash tools/test.sh -m ""            # everything
#   bash tools/test.sh tests/models -x
#   bash tools/test.sh -n 0 --pdb       # in one process, to debug
#
# Two processes run the tests, with one thread each. PYTHON and VENV are explained in tools/setup_env.sh.
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
export VENV
bash "$ROOT/tools/setup_env.sh" || exit
cd "$ROOT" || exit

style=0
"$VENV/bin/python" -m ruff check . || style=1
"$VENV/bin/python" -m ruff format --check . || style=1
if [ "$style" -ne 0 ]; then
    echo "style: FAILED, see above; mend most of it: ruff check --fix . && ruff format ." >&2
fi

# pytest comes last, so that its closing line is the last one printed. Later options win: -n 0.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
"$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@"
tests=$?
[ "$tests" -ne 0 ] && exit "$tests"
exit "$style"

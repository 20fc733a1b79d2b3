#!/usr/bin/env bash
# Creates .venv and installs everything, including Detectron2. You can run it again at any time: it
# takes a second if nothing has changed, and repairs an interrupted set-up.
#
#   bash tools/setup_env.sh
#   PYTHON=python3.12 bash tools/setup_env.sh       # choose the Python (3.10 or newer)
#   VENV=/path/to/venv bash tools/setup_env.sh      # another place, or your own environment
#   bash tools/setup_env.sh --help                  # these lines
#
# An environment that this script did not create keeps its packages if setup.py's ranges allow them.
# It always keeps its Detectron2. constraints.txt has the exact versions that are tested. It applies
# only to an environment created here with Python 3.10 to 3.13. A newer Python gets versions within
# setup.py's ranges.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
PY="$VENV/bin/python"
STAMP="$VENV/.resnet_backbone_ready"      # written last: the set-up is complete
CREATED="$VENV/.resnet_backbone_created"  # this script made the environment
# The Detectron2 build that is installed where there is none. Its checksum is checked.
DETECTRON2="sal-detectron2==0.7.2 \
    --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
NEWEST_PINNED=13  # constraints.txt is for Python 3.10 up to this 3.x

say() { printf '[set-up] %s\n' "$*"; }
fail() { printf '[set-up] error: %s\n' "$*" >&2; exit 1; }

fingerprint() {  # changes with every file that decides what is installed, and with their place
    echo "$ROOT"
    (cd "$ROOT" && cksum setup.py constraints.txt tools/setup_env.sh)
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

is_suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

is_pinned() { "$PY" -c "import sys; sys.exit(sys.version_info[:2] > (3, $NEWEST_PINNED))"; }

find_python() {  # prints the Python to create the environment with
    if [ -n "${PYTHON:-}" ]; then
        is_suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10 or newer; name another one"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.{12,11,13,10} python3.{14..20}; do
        is_suitable "$candidate" && echo "$candidate" && return
    done
    fail "no Python 3.10 or newer found; install one (Debian, Ubuntu: apt install python3 python3-venv) or set PYTHON=/path/to/python"
}

create_environment() {
    local python version
    python="$(find_python)"
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot create environments; install the missing part (Debian, Ubuntu: apt install python$version-venv)"
    if [ -e "$CREATED" ]; then  # left by an interrupted run: start afresh
        rm -rf "${VENV:?}"/{bin,lib,lib64,include,share,pyvenv.cfg}
    elif [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
        fail "$VENV is there, was not created here and has no working pip; give it one (python -m ensurepip) or name another place with VENV="
    fi
    say "creating $VENV with $python ($version)"
    mkdir -p "$VENV" && touch "$CREATED" || fail "cannot write to $VENV; name another place with VENV="
    "$python" -m venv "$VENV" || fail "could not create $VENV; see the lines above"
}

install_project() {
    local pins=()
    if [ -e "$CREATED" ] && is_pinned; then
        pins=(-c "$ROOT/constraints.txt")
    elif [ -e "$CREATED" ]; then
        say "this Python is newer than those of constraints.txt: the newest versions that fit"
    else
        say "using the packages of $VENV where they fit (it was not created here)"
    fi
    say "installing the project and its dependencies: about 2 to 5 minutes and 6 GB, mostly PyTorch"
    "$PY" -m pip install -qq "${pins[@]+"${pins[@]}"}" -e "$ROOT[all]" ||
        fail "pip could not install the dependencies (see above); mend that and run this again"
    # For the tests of adapters/mmdetection.py. Without its dependencies, most of which are here:
    # it asks for opencv-python, which would overwrite opencv-python-headless.
    "$PY" -m pip install -qq --no-deps "${pins[@]+"${pins[@]}"}" "mmengine>=0.10" addict yapf ||
        fail "pip could not install mmengine (see above); run this again"
}

# Prints "absent", "partial" (the pinned build, files missing), "ready ..." or "broken ...".
detectron2_state() {
    "$PY" -W ignore - <<'PYTHON'
import importlib.metadata as metadata
import importlib.util

try:
    pinned = metadata.distribution("sal-detectron2")
except metadata.PackageNotFoundError:
    pinned = None
if importlib.util.find_spec("detectron2") is None:
    print("absent")
elif pinned and not all(
    file.locate().exists()
    for file in pinned.files or []
    if file.parts[0] == "detectron2" and file.suffix == ".py"
):
    print("partial")
else:
    try:
        import detectron2.modeling
        print("ready", detectron2.__version__, "in", detectron2.__path__[0])
    except Exception as error:
        print("broken", type(error).__name__, str(error).replace("\n", " "))
PYTHON
}

# Only the Python part of the pinned build is used, on every Python and platform: NMS, RoIAlign and
# RoIPool come from torchvision. That is why its cp310 tag does not matter, and why its compiled
# part, which fits one Python and one torch only, is taken out again. The build also drops a
# top-level package "tools" into the environment, which must not shadow anything.
install_detectron2() {
    local site
    site="$("$PY" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
    say "installing Detectron2 (a few seconds)"
    "$PY" -m pip install -qq --no-deps --require-hashes --only-binary=:all: \
        --python-version 3.10 --implementation cp --upgrade --target "$site" \
        -r <(echo "$DETECTRON2") || fail "pip could not install Detectron2 (see above); run this again"
    "$PY" - <<'PYTHON'
import importlib.metadata as metadata
import shutil

build = metadata.distribution("sal-detectron2")
for file in build.files or []:
    if str(file) == "tools/__init__.py":
        shutil.rmtree(file.locate().parent, ignore_errors=True)
    elif file.parts[0] == "detectron2" and file.name.startswith("_C."):
        file.locate().unlink(missing_ok=True)
PYTHON
}

provide_detectron2() {
    local state
    state="$(detectron2_state)"
    case "$state" in absent | partial) install_detectron2; state="$(detectron2_state)" ;; esac
    case "$state" in
        ready*) say "Detectron2: using ${state#ready }" ;;
        *) fail "Detectron2 in $VENV does not work (${state#broken }); mend: $PY -m pip uninstall detectron2 sal-detectron2, then run this again" ;;
    esac
}

main() {
    case "${1:-}" in
        -h | --help) usage; return ;;
        ?*) fail "unknown argument $1; see --help" ;;
    esac
    if [ -x "$PY" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ]; then
        return
    fi
    "$PY" -m pip --version >/dev/null 2>&1 || create_environment
    rm -f "$STAMP"
    install_project
    provide_detectron2
    fingerprint >"$STAMP"
    say "ready: $PY"
}

main "$@"

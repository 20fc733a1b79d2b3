#!/usr/bin/env bash
# The whole path on built-in data, no download of pictures: sets the environment up, generates a
# small detection set, trains Faster R-CNN with our ResNet-18-FPN, evaluates it on held-out
# scenes and draws its detections. At most 10 minutes on 2 CPU cores once .venv is there.
#
#   bash tools/quickstart.sh [--seed N] [--output DIR] [KEY VALUE ...]
#
#   --seed N      seed of the training (1)
#   --output DIR  where everything goes (output/quickstart)
#   KEY VALUE     overrides of the config, for example SOLVER.MAX_ITER 20
#
# PYTHON and VENV are explained in tools/setup_env.sh.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
export VENV
OUTPUT="$ROOT/output/quickstart"
SEED=1
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"  # deprecations inside PyTorch and Detectron2
CONFIG="$ROOT/configs/detection/quickstart/faster_rcnn_R_18_FPN.yaml"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit ;;
        --seed | --output)
            [ $# -ge 2 ] || { echo "quickstart: $1 needs a value; see --help" >&2; exit 2; }
            if [ "$1" = --seed ]; then SEED="$2"; else OUTPUT="$2"; fi
            shift 2 ;;
        -*) echo "quickstart: unknown option $1; see --help" >&2; exit 2 ;;
        *) break ;;
    esac
done
case "$SEED" in '' | *[!0-9]*) echo "quickstart: --seed $SEED is not a whole number" >&2; exit 2 ;; esac
case "$OUTPUT" in /*) ;; *) OUTPUT="$PWD/$OUTPUT" ;; esac
DATA="$OUTPUT/data"
RUN="$OUTPUT/run"

step() {  # step HEADING COMMAND...: runs it, says how long it took, stops the script if it fails
    local heading="$1" start=$SECONDS
    shift
    printf '\n== %s\n' "$heading"
    "$@" || { echo "quickstart: failed: $heading (see above)" >&2; exit 1; }
    printf -- '-- %d s\n' $((SECONDS - start))
}

draw() {  # twelve held-out pictures, one by one and as a sheet
    local id pictures=()
    while read -r id; do
        pictures+=("$DATA/JPEGImages/$id.jpg")
    done < <(head -n 12 "$DATA/ImageSets/Main/test.txt")
    "$VENV/bin/python" tools/demo.py --run "$RUN" --input "${pictures[@]}" \
        --output "$OUTPUT/detections" --sheet "$OUTPUT/detections.png" || return
    [ -s "$OUTPUT/detections.png" ] || { echo "no picture $OUTPUT/detections.png" >&2; return 1; }
}

print_results() {  # what was measured, read from the run's own file
    "$VENV/bin/python" - "$RUN/results.json" <<'PYTHON'
import json
import sys


def numbers(node, name=""):
    if isinstance(node, dict):
        for key, value in node.items():
            yield from numbers(value, f"{name}/{key}" if name else str(key))
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield name, node


with open(sys.argv[1]) as file:
    found = dict(numbers(json.load(file)))
for name, value in found.items():
    if name.rpartition("/")[2] in ("AP", "AP50", "AP75", "AP50-11pt"):
        print(f"{name:32} {value:6.2f}")
PYTHON
}

cd "$ROOT"
step "1/5 environment" bash tools/setup_env.sh
step "2/5 data: handwritten digits on photographs" \
    "$VENV/bin/python" tools/make_quickstart_data.py --output "$DATA"
rm -f "$OUTPUT/detections.png"
[ ! -f "$RUN/config.yaml" ] || rm -rf "$RUN"  # a former run: its curves must not mix with these
step "3/5 training and evaluation, seed $SEED (the long step)" \
    "$VENV/bin/python" tools/train_net.py --config-file "$CONFIG" \
    --voc-root "$DATA" --train-set train --test-set test --output-dir "$RUN" SEED "$SEED" "$@"
step "4/5 drawing detections on held-out scenes" draw
step "5/5 results on the held-out scenes" print_results
cat <<END

done in $SECONDS s; everything lies in $OUTPUT
  AP table, per class   $RUN/results.json
  losses over time      $RUN/metrics.json  (curves: tensorboard --logdir $RUN)
  model, config         $RUN/model_final.pth  $RUN/config.yaml
  detections, one sheet $OUTPUT/detections.png
  detections, each      $OUTPUT/detections/
END

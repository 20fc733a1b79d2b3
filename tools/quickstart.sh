#!/usr/bin/env bash
# The whole path on built-in data, no download of pictures: sets the environment up, pre-trains our
# ResNet-18 as a classifier of handwritten digits, trains Faster R-CNN from these weights and, for
# comparison, with the same schedule from scratch, evaluates both on held-out scenes, shows the gain
# and draws the detections. At most 10 minutes on 2 CPU cores once .venv is there.
#
#   bash tools/quickstart.sh [--seed N] [--output DIR] [key=value ...] [KEY VALUE ...]
#
#   --seed N      seed of the three trainings (1)
#   --output DIR  where everything goes (output/quickstart)
#   key=value     overrides of the classifier's config, for example schedule.scale=0.1
#   KEY VALUE     overrides of the detectors' config, for example SOLVER.MAX_ITER 20
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
CLASSIFIER="$ROOT/configs/classification/quickstart/resnet18.yaml"

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
PRETRAIN="$OUTPUT/pretrain"
RUN="$OUTPUT/run"
SCRATCH="$OUTPUT/scratch"

OF_CLASSIFIER=()
OF_DETECTOR=()
while [ $# -gt 0 ]; do  # "data.std=one" and "SOLVER.MAX_ITER 20" in any order
    case "$1" in
        [A-Z]*=*) echo "quickstart: write '${1%%=*} ${1#*=}' and not '$1'" >&2; exit 2 ;;
        [a-z]*=*) OF_CLASSIFIER+=("$1"); shift ;;
        [A-Z]*)
            [ $# -ge 2 ] || { echo "quickstart: $1 needs a value; see --help" >&2; exit 2; }
            OF_DETECTOR+=("$1" "$2"); shift 2 ;;
        *) echo "quickstart: $1 is no key=value and no KEY VALUE; see --help" >&2; exit 2 ;;
    esac
done

step() {  # step HEADING COMMAND...: runs it, says how long it took, stops the script if it fails
    local heading="$1" start=$SECONDS
    shift
    printf '\n== %s\n' "$heading"
    "$@" || { echo "quickstart: failed: $heading (see above)" >&2; exit 1; }
    printf -- '-- %d s\n' $((SECONDS - start))
}

check_overrides() {  # both configs now: a key that does not exist shall not cost minutes
    "$VENV/bin/python" - "$CLASSIFIER" "$CONFIG" "$@" <<'PYTHON'
import sys

from resnet_backbone.classification.config import load_config as load_classification
from resnet_backbone.detection.config_file import load_config
from resnet_backbone.runtime.errors import one_line_errors

classifier, detector, *words = sys.argv[1:]
cut = words.index("--")
one_line_errors(load_classification)([classifier], words[:cut])
one_line_errors(load_config)(detector, words[cut + 1 :])
PYTHON
}

make_data() {
    check_overrides ${OF_CLASSIFIER[@]+"${OF_CLASSIFIER[@]}"} -- \
        ${OF_DETECTOR[@]+"${OF_DETECTOR[@]}"} || return
    "$VENV/bin/python" tools/prepare_data.py digits --output "$DATA"
}

clear_runs() {  # former runs: their curves must not mix with these
    local run
    rm -f "$OUTPUT/detections.png" "$OUTPUT/curves.png"
    for run in "$PRETRAIN" "$RUN" "$SCRATCH"; do
        [ ! -f "$run/config.yaml" ] || rm -rf "$run"
    done
}

pretrain() {
    "$VENV/bin/python" tools/train_classifier.py --config-file "$CLASSIFIER" \
        --output-dir "$PRETRAIN" train.seed="$SEED" ${OF_CLASSIFIER[@]+"${OF_CLASSIFIER[@]}"}
}

detect() {  # detect FOLDER [OPTION...]
    local folder="$1"
    shift
    "$VENV/bin/python" tools/train_net.py --config-file "$CONFIG" "$@" \
        --voc-root "$DATA" --train-set train --test-set test --output-dir "$folder" \
        SEED "$SEED" ${OF_DETECTOR[@]+"${OF_DETECTOR[@]}"}
}

draw() {  # twelve held-out pictures, one by one and as a sheet; losses and AP50 of both runs
    local id pictures=()
    while read -r id; do
        pictures+=("$DATA/JPEGImages/$id.jpg")
    done < <(head -n 12 "$DATA/ImageSets/Main/test.txt")
    "$VENV/bin/python" tools/demo.py --run "$RUN" --confidence 0.2 --input "${pictures[@]}" \
        --output "$OUTPUT/detections" --sheet "$OUTPUT/detections.png" || return
    [ -s "$OUTPUT/detections.png" ] || { echo "no picture $OUTPUT/detections.png" >&2; return 1; }
    "$VENV/bin/python" tools/report.py curves --run "$RUN=pre-trained" --run "$SCRATCH=from scratch" \
        --output "$OUTPUT/curves.png"
}

print_results() {  # what was measured, read from the runs' own files
    "$VENV/bin/python" - "$PRETRAIN" "$SCRATCH" "$RUN" <<'PYTHON'
import json
import os
import sys

NAMES = ("AP50", "AP50-11pt", "AP", "AP75")
classifier, scratch, run = (
    json.load(open(os.path.join(folder, "results.json"))) for folder in sys.argv[1:]
)
rows = {}
for label, found in (("from scratch", scratch), ("pre-trained", run)):
    rows[label] = [found["results"]["bbox"].get(name) for name in NAMES]
pairs = list(zip(*rows.values()))
rows["gain"] = [None if None in pair else round(pair[1] - pair[0], 1) + 0.0 for pair in pairs]
text = "classifier: {:.1f} % error on {}, {} iterations of {} images"
print(text.format(*(classifier[key] for key in
      ("val_top1_error", "evaluated_on", "iterations", "batch_size"))))
print("detector, {iterations} iterations of {images_per_batch} scenes".format(**run))
print(f"{'':14}" + "".join(f"{name:>10}" for name in NAMES))
for label, values in rows.items():
    sign = "+" if label == "gain" else ""
    cells = ("none" if value is None else format(value, f"{sign}.1f") for value in values)
    print(f"{label:14}" + "".join(f"{cell:>10}" for cell in cells))
if (rows["from scratch"][0] or 0) < 5:
    print("From scratch these iterations end before the detector has learned its first digits;"
          "\nit takes several times as many, for example SOLVER.MAX_ITER 700 (docs/results).")
PYTHON
}

cd "$ROOT"
step "1/7 environment" bash tools/setup_env.sh
step "2/7 data: handwritten digits on photographs" make_data
clear_runs
step "3/7 pre-training: a classifier of the digits, seed $SEED" pretrain
step "4/7 detection from the pre-trained weights" detect "$RUN" --weights "$PRETRAIN/final.safetensors"
step "5/7 detection from scratch, same schedule" detect "$SCRATCH"
step "6/7 drawing detections on held-out scenes, and curves" draw
step "7/7 results on the held-out scenes" print_results
cat <<END

done in $SECONDS s; everything lies in $OUTPUT
  AP table, per class   $RUN/results.json  (from scratch: $SCRATCH/results.json)
  losses, AP50          $OUTPUT/curves.png
  model, config         $RUN/model_final.pth  $RUN/config.yaml
  classifier            $PRETRAIN/final.safetensors
  detections, one sheet $OUTPUT/detections.png
  detections, each      $OUTPUT/detections/
END

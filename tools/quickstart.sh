#!/usr/bin/env bash
# Trains a detector that finds handwritten digits on photographs, from built-in pictures alone.
# It sets up the environment, pre-trains our ResNet-18 as a classifier of digits, trains Faster R-CNN
# from these weights, evaluates it on held-out scenes, and draws what it finds. This takes at most
# 6 minutes on 2 CPU cores once .venv exists.
#
#   bash tools/quickstart.sh [--seed N] [--compare] [--output DIR] [key=value ...] [KEY VALUE ...]
#
#   --seed N      seed of the trainings (default: 1)
#   --compare     also train the detector from scratch, and show the gain (6 minutes more)
#   --output DIR  folder for everything (default: output/quickstart)
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
COMPARE=
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"  # deprecations inside PyTorch and Detectron2
CONFIG="$ROOT/configs/detection/quickstart/faster_rcnn_R_18_FPN.yaml"
CLASSIFIER="$ROOT/configs/classification/quickstart/resnet18.yaml"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit ;;
        --compare) COMPARE=1; shift ;;
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
        [A-Z]*=*) echo "quickstart: write '${1%%=*} ${1#*=}', not '$1'" >&2; exit 2 ;;
        [a-z]*=*) OF_CLASSIFIER+=("$1"); shift ;;
        [A-Z]*)
            [ $# -ge 2 ] || { echo "quickstart: $1 needs a value; see --help" >&2; exit 2; }
            OF_DETECTOR+=("$1" "$2"); shift 2 ;;
        *) echo "quickstart: $1 is neither key=value nor KEY VALUE; see --help" >&2; exit 2 ;;
    esac
done

# Seconds that the steps take on two cores.
EXPECTED=(0 20 70 240 15)
NAMES=("environment" "data: handwritten digits on photographs" "pre-training: a classifier of the digits"
    "detection from the pre-trained weights" "drawing what the detector finds")
if [ -n "$COMPARE" ]; then
    EXPECTED=(0 20 70 240 330 15)
    NAMES=("${NAMES[@]:0:4}" "detection from scratch, same schedule" "${NAMES[4]}")
fi
NUMBER=0

step() {  # step COMMAND...: runs it, says how long it took, stops the script if it fails
    local heading="$((NUMBER + 1))/${#NAMES[@]} ${NAMES[NUMBER]}" start=$SECONDS left=0 seconds
    for seconds in "${EXPECTED[@]:NUMBER}"; do left=$((left + seconds)); done
    printf '\n== %s (all will take about %d min %02d s more)\n' "$heading" $((left / 60)) $((left % 60))
    "$@" || { echo "quickstart: failed: $heading (see above)" >&2; exit 1; }
    printf -- '-- %d s\n' $((SECONDS - start))
    NUMBER=$((NUMBER + 1))
}

check_overrides() {  # both configs now: a key that does not exist shall not cost minutes
    "$VENV/bin/python" - "$CLASSIFIER" "$CONFIG" "$@" <<'PYTHON'
import sys

from resnet_backbone.classification.config import load_config as load_classification
from resnet_backbone.detection.config import load_config
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
    "$VENV/bin/python" tools/prepare_data.py digits --output "$DATA" --overwrite
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

detect() {  # detect FOLDER FREEZE_AT [OPTION...]
    local folder="$1" frozen="$2"
    shift 2
    "$VENV/bin/python" tools/train_net.py --config-file "$CONFIG" "$@" \
        --voc-root "$DATA" --train-set train --test-set test --output-dir "$folder" \
        SEED "$SEED" MODEL.BACKBONE.FREEZE_AT "$frozen" ${OF_DETECTOR[@]+"${OF_DETECTOR[@]}"}
}

draw() {  # all held-out pictures, and twelve of them as a sheet; losses and AP50
    local id pictures=() runs=(--run "$RUN=pre-trained")
    [ -z "$COMPARE" ] || runs+=(--run "$SCRATCH=from scratch")
    while read -r id; do
        pictures+=("$DATA/JPEGImages/$id.jpg")
    done <"$DATA/ImageSets/Main/test.txt"
    "$VENV/bin/python" tools/demo.py --run "$RUN" --input "${pictures[@]}" \
        --output "$OUTPUT/detections" --sheet "$OUTPUT/detections.png" \
        --json "$OUTPUT/detections.json" RESNET_BACKBONE.TEST.NMS agnostic >"$OUTPUT/demo.log" || return
    [ -s "$OUTPUT/detections.png" ] || { echo "no picture $OUTPUT/detections.png" >&2; return 1; }
    "$VENV/bin/python" tools/report.py curves "${runs[@]}" --output "$OUTPUT/curves.png"
}

print_results() {  # what was measured, read from the runs' own files; fails if nothing is found
    "$VENV/bin/python" - "$DATA" "$OUTPUT/detections.json" "$PRETRAIN" "$RUN" \
        ${COMPARE:+"$SCRATCH"} <<'PYTHON'
import json
import sys
from pathlib import Path

from torch import tensor
from torchvision.ops import box_iou

from resnet_backbone.detection.data.voc import read_annotation
from resnet_backbone.runtime.records import read_results


def overlap(digit, box):  # a digit's box is in VOC's pixels, which count from 1
    return box_iou(tensor([digit]) - tensor([1, 1, 0, 0]), tensor([box])).item()


data, found, classifier, *runs = map(Path, sys.argv[1:])
print("classifier: {val_top1_error:.1f} % error on {evaluated_on}, {iterations} iterations of "
      "{batch_size} images".format(**read_results(classifier)))
first = read_results(runs[0])
print("detector: {iterations} iterations of {images_per_batch} scenes".format(**first))
names, rows = ("AP50", "AP50-11pt", "AP", "AP75"), {}
for run, label in zip(runs, ("pre-trained", "from scratch")):
    rows[label] = [read_results(run)["results"]["bbox"].get(name) for name in names]
if len(rows) == 2:
    rows["gain"] = [None if None in pair else pair[0] - pair[1] for pair in zip(*rows.values())]
print(f"{'':14}" + "".join(f"{name:>10}" for name in names))
for label, values in rows.items():
    sign = "+" if label == "gain" else ""
    cells = ("none" if value is None else format(value, f"{sign}.1f") for value in values)
    print(f"{label:14}" + "".join(f"{cell:>10}" for cell in cells))

content = json.loads(found.read_text())
detections = {Path(one["file"]).stem: one["detections"] for one in content["images"]}
right = digits = wrong = 0
for image in (data / "ImageSets" / "Main" / "test.txt").read_text().split():
    left = list(read_annotation(str(data / "Annotations" / f"{image}.xml"))[2])
    digits += len(left)
    for one in sorted(detections[image], key=lambda one: -one["score"]):
        fits = [digit for digit in left
                if digit.name == one["class"] and overlap(digit.box, one["box"]) >= 0.5]
        right, wrong = right + bool(fits), wrong + (not fits)
        for digit in fits[:1]:
            left.remove(digit)
print(f"\nfound {right} of {digits} digits on the held-out scenes, with {wrong} wrong boxes "
      f"(confidence {content['confidence']} or more)")
if not right:
    sys.exit("error: the detector found no digit: give it more iterations (SOLVER.MAX_ITER)")
PYTHON
}

cd "$ROOT"
step bash tools/setup_env.sh
step make_data
clear_runs
step pretrain
step detect "$RUN" 2 --weights "$PRETRAIN/final.safetensors"
[ -z "$COMPARE" ] || step detect "$SCRATCH" 0
step draw
cat <<END

Done in $SECONDS s. Everything is in $OUTPUT:
  what it finds         $OUTPUT/detections.png  (each picture: detections/)
  losses, AP50          $OUTPUT/curves.png
  AP, per class         $RUN/results.json
  detector, config      $RUN/model_final.pth  $RUN/config.yaml
  classifier            $PRETRAIN/final.safetensors

END
print_results || { echo "quickstart: failed: results (see above)" >&2; exit 1; }

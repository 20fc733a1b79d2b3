"""Draw what a trained detector or segmentation model finds in images and videos.

With a run of tools/train_net.py, on one image, on a folder, on what a pattern matches:

  python tools/demo.py --run output/r50 --input street.jpg --output street_detected.jpg
  python tools/demo.py --run output/r50 --input photos/ 'more/*.png' --output detected/
  python tools/demo.py --run output/r50 --input drive.mp4 --output drive_detected.mp4

With a config and a checkpoint, also as one sheet and as numbers:

  python tools/demo.py --config-file configs/detection/voc/faster_rcnn_R_50_FPN.yaml \\
      --input photos/ --sheet sheet.png --json detections.json MODEL.WEIGHTS model_final.pth

As a page in the browser, to drop pictures on and to move the threshold:

  python tools/demo.py --run output/r50 --web

Any config key can be overridden by trailing pairs, for example INPUT.MIN_SIZE_TEST 480.
A checkpoint that was trained on other input than the config gives it (INPUT.FORMAT,
MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, MODEL.RESNETS.STRIDE_IN_1X1) is refused with the line to write;
RESNET_BACKBONE.WEIGHTS_INPUT set takes these values from the checkpoint.
RESNET_BACKBONE.TEST.PRECISION bfloat16 is mixed precision, faster on most recent CPUs and GPUs.
Small pictures are enlarged before drawing. Boxes in the JSON file are x0, y0, x1, y1 in pixels of
the original image, turned upright as its EXIF data says. Exit status: 0, all inputs were done;
1, some could not be read (they are named at the end); 2, nothing was done, with the reason.
"""

from __future__ import annotations

import argparse
import glob
import logging
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from resnet_backbone.cli import CommandParser, positive
from resnet_backbone.detection.checkpoint.input_check import prepare_weights
from resnet_backbone.detection.config import UsageError, load_config
from resnet_backbone.detection.data.arguments import detects_objects
from resnet_backbone.detection.inference.pictures import (
    UnreadableError,
    contact_sheet,
    draw_output,
    read_bgr,
    read_video,
    save_image,
    video_writer,
)
from resnet_backbone.detection.inference.predictor import (
    Predictor,
    describe_output,
    find_class_names,
    run_config,
)
from resnet_backbone.runtime.errors import one_line_errors
from resnet_backbone.runtime.files import write_json

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
LEAST = 0.05  # score of detections that are known to the program, as in evaluations
NO_NAMES = """\
note: the names of the classes are not known, so numbers are written; give \
RESNET_BACKBONE.CLASS_NAMES "['first', 'second', ...]\""""
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    model = parser.add_argument_group("model", "One of the two.")
    model.add_argument("--run", metavar="DIR", help="run folder of tools/train_net.py")
    model.add_argument("--config-file", metavar="FILE", help="YAML; add MODEL.WEIGHTS FILE")
    add = parser.add_argument
    text = "images, folders, videos, globs"
    add("--input", nargs="+", default=[], metavar="PATH", help=text)
    add("--web", action="store_true", help="open a page to try the detector on")
    text = "of --web; 0.0.0.0: all machines (default: this one)"
    add("--host", default="127.0.0.1", help=text)
    add("--port", type=int, default=7860, help="of --web (default: 7860)")
    add("--output", metavar="PATH", help="folder, or file for a single input")
    add("--confidence", type=float, default=0.5, help="least score (default: 0.5)")
    add("--sheet", metavar="FILE", help="one picture of all results, e.g. s.png")
    number = dict(type=positive, metavar="N")
    add("--sheet-columns", default=4, help="(default: 4)", **number)
    add("--sheet-max", default=12, help="most pictures on it (default: 12)", **number)
    add("--json", metavar="FILE", help="detections as numbers")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    if bool(args.run) == bool(args.config_file):
        raise UsageError("give --run DIR, or --config-file FILE with MODEL.WEIGHTS FILE")
    if args.web and args.input:
        raise UsageError("give --web or --input, not both: the page takes pictures one by one")
    if not (args.web or args.input):
        raise UsageError("nothing to look at: give --input, or --web")
    if not (args.web or args.output or args.sheet or args.json):
        raise UsageError("nothing to write: give --output, --sheet or --json")
    if not 0 <= args.confidence <= 1:
        raise UsageError(f"--confidence {args.confidence}: it lies between 0 and 1")
    if args.sheet and Path(args.sheet).suffix.lower() not in IMAGES:
        raise UsageError(f"--sheet {args.sheet}: name an image file, such as sheet.png")
    return args


def find_inputs(words: list[str]) -> list[Path]:
    """Files named by paths, folders (their images and videos) and patterns, each once."""
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        inside = path.iterdir() if path.is_dir() else map(Path, glob.glob(word, recursive=True))
        media = [p for p in inside if p.suffix.lower() in IMAGES + VIDEOS and p.is_file()]
        paths = [path] if path.is_file() else sorted(media)
        if not paths:
            kind = "no image or video in this folder" if path.is_dir() else "no such file or match"
            raise UsageError(f"--input {word}: {kind}")
        found |= dict.fromkeys(paths)
    return list(found)


def plan_outputs(inputs: list[Path], output: str | None) -> list[Path | None]:
    """The file to write for each input; equal names get a number."""
    if output is None:
        return [None] * len(inputs)
    suffix = Path(output).suffix.lower()
    if suffix in IMAGES + VIDEOS and not os.path.isdir(output):
        if len(inputs) > 1:
            raise UsageError(f"--output {output}: a file for {len(inputs)} inputs; name a folder")
        if (suffix in VIDEOS) != is_video(inputs[0]):
            raise UsageError(f"--output {output}: {inputs[0]} is of the other kind, image or video")
        if suffix in VIDEOS and suffix != ".mp4":
            raise UsageError(f"--output {output}: videos are written as .mp4")
        return [Path(output)]
    planned: dict[Path, None] = {}
    for path in inputs:
        kept = path.suffix if path.suffix.lower() in IMAGES else ".png"
        kept = ".mp4" if is_video(path) else kept
        name, number = Path(output) / (path.stem + kept), 1
        while name in planned:
            number += 1
            name = Path(output) / f"{path.stem}_{number}{kept}"
        planned[name] = None
    return list(planned)


def refuse_to_overwrite(inputs: list[Path], outputs: list[str | Path | None]) -> None:
    """Raises UsageError if something to write is something to read."""
    read = {path.resolve() for path in inputs}
    for path in filter(None, outputs):
        if Path(path).resolve() in read:
            raise UsageError(f"{path} is an input and would be overwritten; write elsewhere")


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def build_config(args: argparse.Namespace):
    """The detector's config: the run's or the given one, with weights, device and threshold."""
    if args.run:
        cfg = run_config(args.run, args.opts)
    else:
        device = [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"]
        cfg = load_config(args.config_file, [*device, *args.opts])
    for line in prepare_weights(cfg, given=args.opts[::2]):
        print(f"weights: {line}")
    least = min(args.confidence, LEAST)  # so that "0 detections" can say what the best one was
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = least
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = least
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = args.confidence
    return cfg


class Demo:
    """Detects, draws and writes; keeps the detections and the pictures of the sheet."""

    def __init__(self, predictor: Predictor, args: argparse.Namespace):
        self.predictor, self.args = predictor, args
        cfg, names = predictor.cfg, []
        if detects_objects(cfg):
            names = find_class_names(cfg)
            if not names:
                print(NO_NAMES, file=sys.stderr)
        self.names = names, list(cfg.RESNET_BACKBONE.STUFF_CLASS_NAMES)
        self.detections: list[dict] = []
        self.pictures: list[tuple[str, np.ndarray]] = []
        self.best = 0.0  # score of all that was found, shown or not

    def image(self, path: Path, output: Path | None) -> int:
        """Does one image; returns the number of detections. UnreadableError: it is broken."""
        number, picture = self._detect(read_bgr(path), {"file": str(path)})
        if output:
            save_image(output, picture)
        self._keep(path, picture)
        return number

    def video(self, path: Path, output: Path | None) -> int:
        """Does one video, frame by frame; the frame with most detections goes on the sheet."""
        rate, count, frames = read_video(path)
        numbers, best = [], None
        with video_writer(output, rate) if output else nullcontext() as write:
            bar = tqdm(frames, total=count, desc=path.name, unit="frame", leave=False, disable=None)
            for index, frame in enumerate(bar):
                number, picture = self._detect(frame, {"file": str(path), "frame": index})
                if write:
                    write(picture)
                if number > max(numbers, default=-1):
                    best = picture
                numbers.append(number)
        self._keep(path, best)
        return sum(numbers)

    def _detect(self, bgr: np.ndarray, where: dict) -> tuple[int, np.ndarray]:
        output = self.predictor(bgr)
        if "instances" in output:
            instances = output["instances"]
            self.best = max([self.best, *instances.scores.tolist()])
        output = self.above(output, self.args.confidence)
        found = describe_output(output, *self.names)
        self.detections += [{**where, **entry} for entry in found]
        rgb = np.ascontiguousarray(bgr[:, :, ::-1])
        return len(found), draw_output(rgb, output, *self.names, self.args.confidence)

    @staticmethod
    def above(output: dict, confidence: float) -> dict:
        """A detector's output with the instances of this score or more."""
        if "instances" not in output:
            return output
        instances = output["instances"]
        return {**output, "instances": instances[instances.scores >= confidence]}

    def hint(self, number: int) -> str:
        """What to do where nothing is shown, and something was found with a lower score."""
        if number or self.best < LEAST:
            return ""
        lower = max(math.floor(self.best * 20) / 20, LEAST)
        return f" (best score {self.best:.2f}; try --confidence {lower:g})"

    def _keep(self, path: Path, picture: np.ndarray) -> None:
        if self.args.sheet and len(self.pictures) < self.args.sheet_max:
            self.pictures.append((path.name, picture))

    def write_sheet(self, path: Path) -> None:
        captions, pictures = zip(*self.pictures, strict=True)
        save_image(path, contact_sheet(pictures, self.args.sheet_columns, captions))

    def write_json(self, path: Path, unreadable: list[str]) -> None:
        """Detections with where they come from; boxes are xyxy in pixels of the original image."""
        content = {"weights": self.predictor.cfg.MODEL.WEIGHTS, "confidence": self.args.confidence}
        content |= {"unreadable": unreadable, "detections": self.detections}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content, indent=1, ensure_ascii=False)


def run(demo: Demo, inputs: list[Path], outputs: list[Path | None]) -> list[str]:
    """Does all inputs, a line for each; returns what is wrong with those that cannot be read."""
    problems = []
    with tqdm(total=len(inputs), unit="file", disable=None) as bar:
        for path, output in zip(inputs, outputs, strict=True):
            start, demo.best = time.perf_counter(), 0.0
            try:
                number = (demo.video if is_video(path) else demo.image)(path, output)
                seconds = time.perf_counter() - start
                bar.write(f"{path}: {number} detections{demo.hint(number)}, {seconds:.2f} s")
            except UnreadableError as error:
                problems.append(str(error))
            bar.update()
    return problems


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if args.web:
        from resnet_backbone.cli.demo_page import serve  # Gradio is an extra

        return serve(Demo(Predictor(build_config(args)), args))
    inputs = find_inputs(args.input)
    outputs = plan_outputs(inputs, args.output)
    refuse_to_overwrite(inputs, [*outputs, args.sheet, args.json])
    demo = Demo(Predictor(build_config(args)), args)
    problems = run(demo, inputs, outputs)
    if args.sheet and demo.pictures:
        demo.write_sheet(Path(args.sheet))
    if args.json:
        demo.write_json(Path(args.json), problems)
    for written in filter(None, (args.output, args.sheet, args.json)):
        if os.path.exists(written):
            print(f"written: {written}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"error: {len(problems)} of {len(inputs)} inputs not done", file=sys.stderr)
        raise SystemExit(2 if len(problems) == len(inputs) else 1)

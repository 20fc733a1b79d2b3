"""Draw what a trained detector or segmentation model finds in images and videos.

With a run of train-net, on an image, on a folder and a pattern, on a video:

  resnet-backbone demo --run output/r50 --input street.jpg --output street_detected.jpg
  resnet-backbone demo --run output/r50 --input photos/ 'more/*.png' --output detected/
  resnet-backbone demo --run output/r50 --input drive.mp4 --output drive_detected.mp4

With a config and a checkpoint, as one sheet and as numbers; on a page in the browser:

  resnet-backbone demo --config-file voc/faster_rcnn_R_50_FPN \\
      --input photos/ --sheet sheet.png --json detections.json MODEL.WEIGHTS model_final.pth
  resnet-backbone demo --run output/r50 --web

KEY VALUE pairs at the end override the config, for example INPUT.MIN_SIZE_TEST 480.
RESNET_BACKBONE.TEST.PRECISION bfloat16 is mixed precision, which is faster on recent CPUs and GPUs.
If a checkpoint was trained on other input than the config has (INPUT.FORMAT, MODEL.PIXEL_MEAN,
MODEL.PIXEL_STD, MODEL.RESNETS.STRIDE_IN_1X1), the error says what to write.
RESNET_BACKBONE.WEIGHTS_INPUT set takes these values from the checkpoint.
Small images are enlarged before drawing. The JSON file lists every image with its detections. Boxes
are x0, y0, x1, y1 in pixels of the original image after its EXIF rotation. Exit status: 0, all
inputs were done; 1, some could not be read (they are named at the end); 2, nothing was done.
"""

from __future__ import annotations

import argparse
import glob
import logging
import math
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from resnet_backbone.cli import CommandParser, positive
from resnet_backbone.detection.checkpoint.input_check import prepare_weights
from resnet_backbone.detection.config import UsageError, take_back_overrides
from resnet_backbone.detection.data.arguments import detects_objects
from resnet_backbone.detection.inference import pictures
from resnet_backbone.detection.inference.predictor import (
    Predictor,
    describe_output,
    find_class_names,
    run_config,
    testing_config,
)
from resnet_backbone.runtime.errors import one_line_errors
from resnet_backbone.runtime.files import write_json
from resnet_backbone.runtime.images import EXTENSIONS

WRITTEN = tuple(one for one in EXTENSIONS if one not in (".avif", ".gif", ".pgm", ".pbm"))
COLUMNS = ["class", "score", "x0", "y0", "x1", "y1"]  # of the page's table
LEAST = 0.05  # lowest score of the detector, as in evaluations
SCORES = (  # keys that --confidence sets
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.RETINANET.SCORE_THRESH_TEST"),
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
)
NO_NAMES = """\
note: the class names are not known, so numbers are shown; give \
RESNET_BACKBONE.CLASS_NAMES "['first', 'second', ...]\""""
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    model = parser.add_argument_group("model (give one)")
    model.add_argument("--run", metavar="DIR", help="run folder of train-net")
    text = "a file or a name; add MODEL.WEIGHTS FILE"
    model.add_argument("--config-file", metavar="FILE", help=text)
    add = parser.add_argument
    text = "images, folders, videos, or patterns"
    add("--input", nargs="+", default=[], metavar="PATH", help=text)
    add("--web", action="store_true", help="serve a page to try the detector on")
    text = "address of --web; 0.0.0.0: reachable from other machines (default: this one only)"
    add("--host", default="127.0.0.1", help=text)
    add("--port", type=int, default=7860, help="port of --web (default: 7860)")
    add("--output", metavar="PATH", help="folder, or a file for a single input")
    add("--confidence", type=float, default=0.5, help="lowest score to show (default: 0.5)")
    add("--sheet", metavar="FILE", help="one image of all results, such as sheet.png")
    text = "images per row (default: 4)"
    add("--sheet-columns", type=positive, default=4, metavar="N", help=text)
    text = "maximum number of images (default: 12)"
    add("--sheet-max", type=positive, default=12, metavar="N", help=text)
    add("--json", metavar="FILE", help="write the detections as numbers")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    take_back_overrides(args, "input")
    if bool(args.run) == bool(args.config_file):
        raise UsageError("give --run DIR, or --config-file FILE with MODEL.WEIGHTS FILE")
    if args.web and args.input:
        raise UsageError("give either --web or --input")
    if not (args.web or args.input):
        raise UsageError("no input: give --input or --web")
    if not (args.web or args.output or args.sheet or args.json):
        raise UsageError("no output: give --output, --sheet, or --json")
    if not 0 <= args.confidence <= 1:
        raise UsageError(f"--confidence {args.confidence}: give a number between 0 and 1")
    for key in args.opts[::2]:
        if key in SCORES:
            raise UsageError(f"{key} is set by --confidence: leave it out")
    if args.sheet and Path(args.sheet).suffix.lower() not in WRITTEN:
        raise UsageError(f"--sheet {args.sheet}: name an image file, such as sheet.png")
    return args


def find_inputs(words: list[str]) -> list[Path]:
    """Returns the files of paths, folders (their images and videos) and patterns, each once."""
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        inside = path.iterdir() if path.is_dir() else map(Path, glob.glob(word, recursive=True))
        media = [p for p in inside if p.suffix.lower() in EXTENSIONS + VIDEOS and p.is_file()]
        paths = [path] if path.is_file() else sorted(media)
        if not paths:
            kind = "this folder has no image or video" if path.is_dir() else "no such file"
            raise UsageError(f"--input {word}: {kind}")
        found |= dict.fromkeys(paths)
    return list(found)


def plan_outputs(inputs: list[Path], output: str | None) -> list[Path | None]:
    """Returns the file to write for each input; duplicate names get a number."""
    if output is None:
        return [None] * len(inputs)
    suffix = Path(output).suffix.lower()
    if suffix in WRITTEN + VIDEOS and not os.path.isdir(output):
        if len(inputs) > 1:
            raise UsageError(
                f"--output {output} is one file for {len(inputs)} inputs; name a folder"
            )
        if (suffix in VIDEOS) != is_video(inputs[0]):
            raise UsageError(
                f"--output {output}: an image gives an image, and a video a video ({inputs[0]})"
            )
        if suffix in VIDEOS and suffix != ".mp4":
            raise UsageError(
                f"--output {output}: name it .mp4, the only format of videos that is written"
            )
        return [Path(output)]
    planned: dict[Path, None] = {}
    for path in inputs:
        kept = path.suffix if path.suffix.lower() in WRITTEN else ".png"
        kept = ".mp4" if is_video(path) else kept
        name, number = Path(output) / (path.stem + kept), 1
        while name in planned:
            number += 1
            name = Path(output) / f"{path.stem}_{number}{kept}"
        planned[name] = None
    return list(planned)


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def build_predictor(args: argparse.Namespace) -> Predictor:
    if args.run:
        cfg = run_config(args.run, args.opts)
    else:
        cfg = testing_config(args.config_file, args.opts)
    for line in prepare_weights(cfg, given=args.opts[::2]):
        print(f"weights: {line}")
    least = min(args.confidence, LEAST)  # so that "0 detections" can state the best score
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = least
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = least
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = args.confidence
    return Predictor(cfg)


class Demo:
    """Detects, draws and writes; collects the detections and the sheet's images."""

    def __init__(self, predictor: Predictor, args: argparse.Namespace):
        self.predictor, self.args = predictor, args
        cfg, names = predictor.cfg, []
        if detects_objects(cfg):
            names = find_class_names(cfg)
            if not names:
                print(NO_NAMES, file=sys.stderr)
        self.names = names, list(cfg.RESNET_BACKBONE.STUFF_CLASS_NAMES)
        self.images: list[dict] = []  # file, frame of a video, detections
        self.pictures: list[tuple[str, np.ndarray]] = []
        self.best: list[float] = []  # best score in each input, shown or not

    def run(self, path: Path, output: Path | None) -> str:
        """Processes an image or a video; returns a line to print. Raises UnreadableError."""
        start = time.perf_counter()
        self.best.append(0.0)
        number = (self._video if is_video(path) else self._image)(path, output)
        hint = "" if number else self.hint(self.best[-1])
        return f"{path}: {number} detections{hint}, {time.perf_counter() - start:.2f} s"

    @cached_property
    def scratch(self) -> tempfile.TemporaryDirectory:
        """A folder for the page's downloads, removed at the end."""
        return tempfile.TemporaryDirectory()

    @staticmethod
    def hint(best: float) -> str:
        """Suggests a lower threshold if nothing is shown; "" if there is nothing below it."""
        lower = max(math.floor(best * 20) / 20, LEAST)
        return f" (best score {best:.2f}; try --confidence {lower:g})" if best >= LEAST else ""

    def _image(self, path: Path, output: Path | None) -> int:
        number, picture = self._detect(pictures.read_bgr(path), {"file": str(path)})
        if output:
            pictures.save_image(output, picture)
        self._keep(path, picture)
        return number

    def _video(self, path: Path, output: Path | None) -> int:
        """Processes each frame; the one with the most detections goes on the sheet."""
        rate, count, frames = pictures.read_video(path)
        numbers, best = [], None
        with pictures.video_writer(output, rate) if output else nullcontext() as write:
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
            self.best[-1] = max([self.best[-1], *output["instances"].scores.tolist()])
        found, picture = self.show(bgr[:, :, ::-1], output, self.args.confidence)
        self.images.append({**where, "detections": found})
        return len(found), picture

    def show(self, rgb: np.ndarray, output: dict, confidence: float) -> tuple[list, np.ndarray]:
        """Returns the detections with at least this score, as numbers and as a drawing."""
        if "instances" in output:
            instances = output["instances"]
            output = {**output, "instances": instances[instances.scores >= confidence]}
        drawn = pictures.draw_output(np.ascontiguousarray(rgb), output, *self.names, confidence)
        return describe_output(output, *self.names), drawn

    def _keep(self, path: Path, picture: np.ndarray) -> None:
        if self.args.sheet and len(self.pictures) < self.args.sheet_max:
            self.pictures.append((path.name, picture))

    def write(self, unreadable: list[str]) -> None:
        """Writes the sheet, and the JSON file that the module's docstring describes."""
        args = self.args
        if args.sheet and self.pictures:
            captions, drawn = zip(*self.pictures, strict=True)
            sheet = pictures.contact_sheet(drawn, args.sheet_columns, captions)
            pictures.save_image(Path(args.sheet), sheet)
        if args.json:
            content = {"weights": self.predictor.cfg.MODEL.WEIGHTS, "confidence": args.confidence}
            content |= {"unreadable": unreadable, "images": self.images}
            write_json(args.json, content, indent=1, ensure_ascii=False)


def for_page(demo: Demo, picture: np.ndarray, output: dict, threshold: float):
    found, drawn = demo.show(picture, output, threshold)
    rows = [
        [one["class"], round(one.get("score", one.get("share", 0)), 3), *one.get("box", [])]
        for one in found
    ]
    text = f"{len(found)} detections with a score of {threshold:.2f} or more"
    if not found and "instances" in output and len(output["instances"]):
        text += f"; the best has {output['instances'].scores.max():.2f}: lower the threshold"
    file = Path(demo.scratch.name, "detections.json")  # Gradio copies it
    write_json(file, {"confidence": threshold, "detections": found})
    return drawn, rows, text, str(file)


def build_page(demo: Demo) -> Any:
    """Builds a Gradio page to drop an image, move the threshold, and download the JSON.

    The detector runs once per image; the threshold then selects among its detections.
    """
    try:
        import gradio
    except ImportError as error:
        raise UsageError("--web needs Gradio: pip install 'resnet_backbone[web]'") from error

    def detect(picture: np.ndarray | None, threshold: float):
        output = None if picture is None else demo.predictor(picture[:, :, ::-1])
        return (output, *show(picture, output, threshold))

    def show(picture: np.ndarray | None, output: dict | None, threshold: float):
        if output is None:
            return None, [], "Drop an image on the left.", None
        return for_page(demo, picture, output, threshold)

    title = f"What {demo.args.run or demo.args.config_file} finds"
    with gradio.Blocks(title=title) as page:
        gradio.Markdown(f"## {title}")
        state = gradio.State()
        with gradio.Row():
            picture = gradio.Image(label="image", type="numpy", image_mode="RGB")
            drawn = gradio.Image(label="detections", interactive=False)
        threshold = gradio.Slider(LEAST, 1, demo.args.confidence, step=0.01, label="lowest score")
        text = gradio.Markdown()
        table = gradio.Dataframe(headers=COLUMNS, interactive=False)
        file = gradio.DownloadButton("Download as JSON")
        results = [drawn, table, text, file]
        picture.change(detect, [picture, threshold], [state, *results])
        threshold.change(show, [picture, state, threshold], results, show_progress="hidden")
    return page


def serve(args: argparse.Namespace) -> None:
    page = build_page(Demo(build_predictor(args), args))
    print(f"Open http://{args.host}:{args.port} in a browser. Ctrl-C ends it.", flush=True)
    try:
        page.launch(server_name=args.host, server_port=args.port, quiet=True)
    except OSError as error:
        raise UsageError(f"--port {args.port}: {error}; choose another one") from error


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if args.web:
        return serve(args)
    inputs = find_inputs(args.input)
    outputs = plan_outputs(inputs, args.output)
    read, problems = {path.resolve() for path in inputs}, []
    for path in filter(None, [*outputs, args.sheet, args.json]):
        if Path(path).resolve() in read:
            raise UsageError(f"{path} is an input and would be overwritten; choose another output")
    for path in filter(os.path.isdir, filter(None, (args.sheet, args.json))):
        raise UsageError(f"{path} is a folder: give the path of a file")
    demo = Demo(build_predictor(args), args)
    with tqdm(total=len(inputs), unit="file", disable=None) as bar:
        for path, output in zip(inputs, outputs, strict=True):
            try:
                bar.write(demo.run(path, output))
            except pictures.UnreadableError as error:
                text = str(error)
                problems.append(text if str(path) in text else f"{path}: {text}")
            bar.update()
    demo.write(problems)
    if len(inputs) > 1 and not any(image["detections"] for image in demo.images):
        print(f"0 detections in all inputs{demo.hint(max(demo.best))}")
    for written in filter(None, (args.output, args.sheet, args.json)):
        if os.path.exists(written):
            print(f"written: {written}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"error: {len(problems)} of {len(inputs)} inputs could not be read", file=sys.stderr)
        raise SystemExit(2 if len(problems) == len(inputs) else 1)

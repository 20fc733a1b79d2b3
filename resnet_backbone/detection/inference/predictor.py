"""Trained detectors for evaluation and prediction: improvements, engine, precision, timing."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from resnet_backbone.detection.checkpoint.checkpointer import Checkpointer
from resnet_backbone.detection.checkpoint.files import find_weights
from resnet_backbone.detection.checkpoint.input_check import (
    prepare_weights,
    require_weights,
    with_weights_input,
)
from resnet_backbone.detection.config import UsageError, backbone_node, load_config
from resnet_backbone.detection.inference.detector import (
    KEY,
    ImprovedDetector,
    Switches,
    check_scales,
    read_precision,
    read_switches,
)
from resnet_backbone.detection.inference.member import Member
from resnet_backbone.detection.inference.pictures import UnreadableError, read_bgr
from resnet_backbone.detection.modeling import build_detector
from resnet_backbone.detection.modeling.localization import LocalizationRCNN
from resnet_backbone.fast import optimize_for_inference
from resnet_backbone.fast.engines import CALIBRATION, InferenceNetwork
from resnet_backbone.runtime.images import find_pictures, spread


class Predictor:
    """Detectron2's DefaultPredictor with checked weights, for one image at a time.

    ``RESNET_BACKBONE.TEST`` adds the paper's improvements and sets the precision. Without them, in
    float32, the detections are DefaultPredictor's for the same config and weights.

    Args:
        cfg: a detector's config; ``MODEL.WEIGHTS`` names its checkpoint. It is not modified: with
            ``RESNET_BACKBONE.WEIGHTS_INPUT`` "set", a copy takes on the weights' input settings.

    Raises:
        UsageError: ``MODEL.WEIGHTS`` is empty; see also :func:`improve`.
        WeightsError: the weights cannot be read, do not fill the whole detector, belong to another
            one, or were trained on other input than the config's.
    """

    def __init__(self, cfg: CfgNode):
        check_format(cfg)
        self.cfg = with_weights_input(cfg)
        self.model = for_testing(self.cfg, trained_detector(self.cfg))

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> dict:
        """Returns the detector's output for an image: BGR, uint8, (H, W, 3), of any size.

        It is ``{"instances": Instances}`` with ``pred_boxes`` (xyxy in pixels of `image`),
        ``scores``, ``pred_classes``. The image is resized to ``INPUT.MIN_SIZE_TEST``.
        """
        return self.model([test_input(self.cfg, image)])[0]


def test_input(cfg: CfgNode, image: np.ndarray) -> dict:
    """Returns the model input for an image, BGR, uint8, (H, W, 3), resized for testing.

    Raises:
        TypeError: something else, such as floats or a path.
        UnreadableError: the shorter side would have no pixel.
    """
    if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", "")
        raise TypeError(f"expected an image as BGR, uint8, (H, W, 3), not {found[0]} {found[1]}")
    height, width = image.shape[:2]
    if cfg.INPUT.FORMAT == "RGB":
        image = image[:, :, ::-1]
    side, limit = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST  # 0: is not resized
    if side and not min(ResizeShortestEdge.get_output_shape(height, width, side, limit)):
        raise UnreadableError(f"an image of {width} x {height} pixels is too narrow to be resized")
    resized = ResizeShortestEdge([side] * 2, limit).get_transform(image).apply_image(image)
    pixels = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
    return {"image": pixels, "height": height, "width": width, "original": image}


def check_format(cfg: CfgNode, where: str = "") -> None:
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise UsageError(f"{where}INPUT.FORMAT must be RGB or BGR, not {cfg.INPUT.FORMAT!r}")


def find_class_names(cfg: CfgNode) -> list[str]:
    """Returns the class names of a detector: the run's, else the data set's, else none."""
    retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    number = (cfg.MODEL.RETINANET if retina else cfg.MODEL.ROI_HEADS).NUM_CLASSES
    choices = [list(backbone_node(cfg).CLASS_NAMES)]
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        choices.append(list(MetadataCatalog.get(name).get("thing_classes", [])))
    return next((names for names in choices if len(names) == number), [])


def describe_output(
    output: dict, class_names: Sequence[str] = (), label_names: Sequence[str] = ()
) -> list[dict]:
    """Converts a Detectron2 model's output for one image to values for JSON.

    Each instance has class, score, box (x0, y0, x1, y1 in pixels) and, if present, mask (COCO's
    compressed run-length encoding) and keypoints (x, y in pixels and score of each). For a purely
    semantic model, each class has its share of the pixels, 0..1, largest first. Panoptic FPN has
    the instances, and then the shares of its stuff. Without `class_names` (boxes and masks) or
    `label_names` (semantic labels), a class is a number.
    """
    if "instances" in output:
        found = []
        for one in instances_to_coco_json(output["instances"].to("cpu"), img_id=0):
            (x, y, width, height), index = one["bbox"], one["category_id"]
            name = class_names[index] if class_names else index
            box = [round(value, 2) for value in (x, y, x + width, y + height)]
            more = {"mask": one["segmentation"]} if "segmentation" in one else {}
            if "keypoints" in one:  # from COCO's pixel indices to coordinates, like boxes
                points = [p + 0.5 * (k % 3 < 2) for k, p in enumerate(one["keypoints"])]
                more["keypoints"] = [round(value, 2) for value in points]
            found.append({"class": name, "score": round(one["score"], 5), "box": box, **more})
        ids, segments = output.get("panoptic_seg", (None, ()))
        for one in (one for one in segments if not one["isthing"]):
            name = label_names[one["category_id"]] if label_names else one["category_id"]
            found.append({"class": name, "share": round(one["area"] / ids.numel(), 5)})
        return found
    labels, counts = output["sem_seg"].argmax(0).unique(return_counts=True)
    shares = (counts / counts.sum()).tolist()
    names = [label_names[index] if label_names else index for index in labels.tolist()]
    found = [{"class": name, "share": round(s, 5)} for name, s in zip(names, shares, strict=True)]
    return sorted(found, key=lambda entry: -entry["share"])


class AutocastModel(nn.Module):
    """Runs a detector in mixed precision of a dtype on a device type."""

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype):
        super().__init__()
        self.model, self.training = model, model.training
        self.device_type, self.dtype = device_type, dtype

    def forward(self, inputs: list[dict]) -> list[dict]:
        with torch.autocast(self.device_type, dtype=self.dtype):
            return self.model(inputs)


class Speed(NamedTuple):
    """Speed of a detector in one process, and what ran it."""

    seconds_per_image: float  # mean, from the input in memory to the detections
    images_at_a_time: int  # size of the largest batch
    engines: dict[str, str]  # the engine that ran each part; empty if PyTorch ran everything


class Timed(nn.Module):
    """A detector that measures its seconds per image; the first batch is a warm-up."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.training = model, model.training
        self.batches: list[tuple[float, int]] = []  # seconds, images

    def forward(self, inputs: list[dict]) -> list[dict]:
        start = self._now()
        outputs = self.model(inputs)
        self.batches.append((self._now() - start, len(inputs)))
        return outputs

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def speed(self) -> Speed | None:
        """The measured speed, or None if there were no images."""
        counted = self.batches[1:] or self.batches
        if not counted:
            return None
        seconds, images = zip(*counted, strict=True)
        parts = self.model.named_modules()
        engines = {name: m.engine for name, m in parts if isinstance(m, InferenceNetwork)}
        return Speed(sum(seconds) / sum(images), max(images), engines)


def timed_inference(
    model: nn.Module, batches: Iterable, evaluator: DatasetEvaluator
) -> tuple[dict, Speed | None]:
    """Runs Detectron2's ``inference_on_dataset``; also returns the speed in this process."""
    timed = Timed(model)
    return inference_on_dataset(timed, batches, evaluator), timed.speed


def for_testing(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Returns the model for evaluation: :func:`improve`, then the engine and precision.

    ``RESNET_BACKBONE.TEST.ENGINE`` and ``.PRECISION`` set them. With "eager" the precision is
    autocast's. With another engine it applies to the parts that the engine runs.
    """
    tested, dtype = improve(cfg, model), read_precision(cfg)
    if dtype is torch.float32 or backbone_node(cfg).TEST.ENGINE != "eager":
        return tested
    return AutocastModel(tested, torch.device(cfg.MODEL.DEVICE).type, dtype)


def calibration_inputs(cfg: CfgNode) -> Iterator[list[dict]]:
    """Yields inputs for int8 from the images in ``RESNET_BACKBONE.TEST.CALIBRATION``."""
    folder = backbone_node(cfg).TEST.CALIBRATION
    if folder:
        files = spread(find_pictures([folder], f"{KEY}.CALIBRATION"), CALIBRATION)
        for file in tqdm(files, "calibration", unit="image", leave=False):
            yield [test_input(cfg, read_bgr(file))]


def improve(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Returns a detector with the improvements and the engine of ``RESNET_BACKBONE.TEST``.

    It is `model` itself if everything is off. ``TEST.AUG.ENABLED``, Detectron2's own test-time
    augmentation, is honored as well.

    Args:
        cfg: the detector's own config. The runs in ``TEST.ENSEMBLE`` are loaded here.
        model: with or without ``DistributedDataParallel``.

    Raises:
        UsageError, WeightsError: a switch or an ensemble member does not fit the detector.
    """
    switches, engine = read_switches(cfg), backbone_node(cfg).TEST.ENGINE
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    if engine != "eager":
        options = dict(dtype=read_precision(cfg), calibration=calibration_inputs(cfg))
        model = bare = optimize_for_inference(bare, engine=engine, **options)
    if cfg.TEST.AUG.ENABLED:
        return GeneralizedRCNNWithTTA(cfg, bare).train(model.training)
    if switches == Switches():
        return model
    others = [load_run(run, cfg) for run in switches.ensemble]
    if isinstance(bare, LocalizationRCNN):
        joined = copy.copy(bare)  # shares its weights
        joined.others = tuple(other for _, other in others)
        return joined
    detectors = [(cfg, bare), *others]
    members = [Member(*one, switches.scales, switches.flip) for one in detectors]
    return ImprovedDetector(members, switches).train(model.training)


def trained_detector(cfg: CfgNode) -> nn.Module:
    """Builds a config's detector in evaluation mode, with all weights from ``MODEL.WEIGHTS``."""
    require_weights(cfg)
    model = build_detector(cfg)
    Checkpointer.from_config(cfg, model).load(cfg.MODEL.WEIGHTS, needs_detector=True)
    return model.eval()


def testing_config(config_file: str, overrides: list[str]) -> CfgNode:
    """Loads a config; without a GPU, ``MODEL.DEVICE`` is cpu. `overrides` take precedence."""
    device = [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"]
    return load_config(config_file, [*device, *overrides])


def run_config(run: str, overrides: list[str]) -> CfgNode:
    """Loads the config of a run folder with ``MODEL.WEIGHTS`` set to the run's weights.

    `overrides` are ``KEY VALUE`` pairs and take precedence. See also :func:`testing_config`.
    """
    config = os.path.join(run, "config.yaml")
    if not os.path.isfile(config):
        raise UsageError(f"{run} has no config.yaml; give a run folder of train-net")
    own = [] if "MODEL.WEIGHTS" in overrides[::2] else ["MODEL.WEIGHTS", find_weights(run)]
    return testing_config(config, [*own, *overrides])


def check_ensemble(cfg: CfgNode) -> None:
    """Runs :func:`check_member` on ``TEST.ENSEMBLE`` before hours of training."""
    for run in backbone_node(cfg).TEST.ENSEMBLE:
        check_member(cfg, run_config(run, []), run)


def check_member(cfg: CfgNode, other: CfgNode, run: str) -> None:
    """Raises UsageError if a run cannot join the ensemble, such as one with other classes."""
    counts = [config.MODEL.ROI_HEADS.NUM_CLASSES for config in (cfg, other)]
    names = [list(config.RESNET_BACKBONE.CLASS_NAMES) for config in (cfg, other)]
    if counts[0] != counts[1] or names[0] != names[1]:
        raise UsageError(
            f"{run} has {counts[1]} classes {names[1]}, but this detector has {counts[0]} "
            f"{names[0]}: they need the same classes in the same order"
        )
    kind, kind_of_other = (config.MODEL.META_ARCHITECTURE for config in (cfg, other))
    if kind_of_other != kind:
        raise UsageError(f"{run} is a {kind_of_other}, not a {kind} as this detector")
    if kind == "LocalizationRCNN" and other.INPUT.FORMAT != cfg.INPUT.FORMAT:
        raise UsageError(
            f"{run} has INPUT.FORMAT {other.INPUT.FORMAT}, but this network has "
            f"{cfg.INPUT.FORMAT}: networks of one ensemble see the same image"
        )
    check_scales(other, list(cfg.RESNET_BACKBONE.TEST.SCALES))
    check_format(cfg)
    check_format(other, f"{run}: ")


_kept: ContextVar[dict[str, tuple[CfgNode, nn.Module]]] = ContextVar("kept")


@contextmanager
def keep_members() -> Iterator[None]:
    """Context in which :func:`load_run` reads each run once and keeps its detector in memory."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def load_run(run: str, cfg: CfgNode) -> tuple[CfgNode, nn.Module]:
    """Returns a run's config and its detector, in evaluation mode on the device of `cfg`."""
    kept = _kept.get({})
    if run not in kept:
        other, model = read_run(run, cfg)
        kept[run] = other, model.cpu()
    other, model = kept[run]
    if torch.device(cfg.MODEL.DEVICE).type != "cpu":
        model = copy.deepcopy(model).to(cfg.MODEL.DEVICE)
    return other, model.eval()


def read_run(run: str, cfg: CfgNode) -> tuple[CfgNode, nn.Module]:
    """Reads what :func:`load_run` returns from the run's files."""
    other = run_config(run, ["MODEL.DEVICE", cfg.MODEL.DEVICE])
    check_member(cfg, other, run)
    prepare_weights(other)
    return other, trained_detector(other)

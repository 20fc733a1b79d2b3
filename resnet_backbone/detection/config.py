"""Configs: this package's keys under ``RESNET_BACKBONE``, and reading of files and ``KEY VALUE``
overrides, with one-line errors.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import operator
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from yaml import Node, SafeLoader, YAMLError, safe_load

from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.files import find_config
from resnet_backbone.runtime.records import flatten

DEFAULTS = CfgNode(
    {
        # Networks. Depth, stride_in_1x1, norm, out features and RES5_DILATION are Detectron2's
        # MODEL.RESNETS.*; RES2_OUT_CHANNELS follows the depth automatically.
        "SHORTCUT": "B",  # A, B, C, highway, none (plain); paper Table 3
        "ACTIVATION": "relu",  # or prelu
        "RES4_DILATION": 1,  # 2 with MODEL.RESNETS.RES5_DILATION 4 gives output stride 8
        "MULTI_GRID": [],  # rates of res5's blocks, e.g. [1, 2, 4] (arXiv 1706.05587)
        "ZERO_INIT_RESIDUAL": False,  # arXiv 1706.02677, 5.1
        "CAFFE_POOL": False,  # pool1 without padding, rounded up, as in the released Caffe nets
        "VGG": {
            "DEPTH": 16,
            "NORM": "",
            "OUT_FEATURES": ["conv5"],  # or conv3, conv4, conv5, pool5 for FPN
        },
        # Weights: whether to check or set INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and
        # MODEL.RESNETS.STRIDE_IN_1X1, which must match the training of MODEL.WEIGHTS.
        # check: other values are an error; set: they are taken from the weights (by the tools, or
        # by resnet_backbone.detection.use_weights_input before the model is built).
        "WEIGHTS_INPUT": "check",
        # Their input, if the file does not state it: msra, caffe_vgg or torchvision.
        "WEIGHTS_PREPROCESSING": "",
        # Data
        "CLASS_NAMES": [],  # in order; empty: from the data. Kept with the run and its checkpoints
        "STUFF_CLASS_NAMES": [],  # of semantic labels, label 0 first; like CLASS_NAMES
        "TRAIN_ON_DIFFICULT": False,  # include VOC's difficult boxes; Faster R-CNN does not
        # Training
        "REFERENCE_BATCH": 0,  # batch size that BASE_LR, STEPS, MAX_ITER assume; 0: no scaling
        "CHANNELS_LAST": True,  # memory format of the convolutions: faster, same results
        "EPOCHS": 0.0,  # above 0: sets SOLVER.MAX_ITER to this many passes over the training images
        "EMA_DECAY": 0.0,  # e.g. 0.9998: evaluations and checkpoints use averaged weights
        "GRADIENT_CHECKPOINTING": False,  # of the backbone: less memory, slower, same gradients
        "ACCUMULATE": 1,  # gradient accumulation: number of parts of each process's batch
        "BEST_METRIC": "",  # TASK/NAME, e.g. bbox/AP50; the best checkpoint is model_best.pth
        "LOGGERS": [],  # wandb, mlflow: log metrics, config and results there
        "EARLY_STOP": 0,  # evaluations without a better BEST_METRIC before a run ends; 0: never
        # The paper's improvements (appendix B). Global context is part of the trained head. The
        # others are for testing.
        "GLOBAL_CONTEXT": False,  # add the whole image's feature to each region's
        # ImageNet localization (appendix C); see configs/detection/imagenet_loc.
        "LOCALIZATION": {
            "WIDTH": 512,  # channels of the proposal network's 3x3 convolution
            "CENTER_CROP": 0,  # side of the center crop in testing, in pixels; 0: the whole image
            "SCALES": [],  # short sides of the whole image in testing; empty: 256 or less
            "REGION_SIZE": 224,  # side of the square that R-CNN warps a proposal to, in pixels
            "PROPOSALS": "",  # run folder of the proposal network that R-CNN starts with
            "GUESSES": "",  # predictions.csv of evaluate-classifier, for the top-5 error
        },
        "TEST": {
            # imagenet_det: AP with ILSVRC's thresholds for small objects; localization: its error;
            # empty: the data set's own metric (VOC, COCO)
            "METRIC": "",
            "OPERATING_POINTS": False,  # best score thresholds, confusion matrix: in results.json
            "BOX_REFINEMENT": False,  # pool again at the regressed boxes, NMS at .3, box voting
            "SCALES": [],  # short sides, e.g. [200, 400, 600, 800, 1000]: maxout over two of them
            "FLIP": False,  # average scores and boxes with those of the mirrored image
            # agnostic: over all classes together; or soft-NMS (arXiv 1704.04503): linear, gaussian
            "NMS": "hard",
            "ENSEMBLE": [],  # run folders of further detectors: union of proposals, mean of scores
            # Evaluation and prediction, on CPUs and GPUs: float32, mixed precision in bfloat16 or
            # float16, or int8 with ENGINE openvino. SOLVER.AMP is for training.
            "PRECISION": "float32",
            "CALIBRATION": "",  # for int8: a folder of representative images, of which 128 are used
            # What runs the backbone, and in int8 the heads: eager, compile, openvino, onnxruntime,
            # or auto, the fastest (resnet_backbone.optimize_for_inference)
            "ENGINE": "eager",
        },
    }
)

DEEPLAB_BACKBONE = "build_paper_resnet_deeplab_backbone"
DEEPLAB_HEADS = ("DeepLabV3Head", "DeepLabV3PlusHead")

CONTEXT_HEADS = {"PaperRes5ROIHeads": "ContextRes5ROIHeads", "StandardROIHeads": "ContextROIHeads"}
"""MODEL.ROI_HEADS.NAME -> its counterpart with global context."""

PROJECTS = {
    "add_deeplab_config": ("deeplab", (*DEEPLAB_HEADS, DEEPLAB_BACKBONE, "WarmupPolyLR")),
    "add_pointrend_config": (
        "point_rend",
        ("PointRendROIHeads", "PointRendMaskHead", "PointRendSemSegHead"),
    ),
}
"""Function that adds keys -> its module in ``detectron2.projects``, config values that need it."""
EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
LARGEST = 1e6  # largest number allowed in a formula
IS_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR|VIS_PERIOD").fullmatch


def add_resnet_backbone_config(cfg: CfgNode) -> CfgNode:
    """Adds the node ``RESNET_BACKBONE`` with its defaults to a Detectron2 config, in place."""
    cfg.RESNET_BACKBONE = DEFAULTS.clone()
    return cfg


def backbone_node(cfg: CfgNode) -> CfgNode:
    """Returns the node ``RESNET_BACKBONE``, or its defaults if the config lacks it."""
    return cfg.get("RESNET_BACKBONE", DEFAULTS)


def saved_values(cfg: CfgNode) -> dict[str, Any]:
    """Returns a config's values by dotted key, as in config.yaml."""
    return dict(flatten(safe_load(cfg.dump())))


def seed_of(cfg: CfgNode) -> int:
    """Returns ``SEED`` or, if it is negative, a random seed shared by all processes."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def with_keys(cfg: CfgNode, *pairs) -> CfgNode:
    """Returns a copy of a config with new values, given as KEY, value, ...; frozen like it."""
    copy = cfg.clone()
    copy.defrost()
    copy.merge_from_list(list(pairs))
    if cfg.is_frozen():
        copy.freeze()
    return copy


def load_config(config_file: str, overrides: Sequence[str]) -> CfgNode:
    """Merges Detectron2's defaults, ours, a YAML file and ``KEY VALUE`` pairs, in this order.

    The file is a path or one of our names, as in :func:`find_config`. UsageError: no such file or
    key, a wrong type, or ``key=value`` instead of ``KEY VALUE``.
    """
    return load_configs(config_file, overrides)[0]


def load_configs(config_file: str, overrides: Sequence[str]) -> tuple[CfgNode, CfgNode]:
    """Returns the config of :func:`load_config`, and the same config without the overrides."""
    cfg = add_resnet_backbone_config(get_cfg())
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if config_file:
        config_file = str(find_config(config_file, "detection"))
        with _formulas_as_numbers():
            _merge(cfg, lambda: _add_project_keys(cfg, config_file, overrides), config_file)
            _merge(cfg, lambda: cfg.merge_from_file(config_file, allow_unsafe=False), config_file)
    planned = cfg.clone()
    _check_pairs(overrides)
    _merge(cfg, lambda: cfg.merge_from_list(list(_as_typed(cfg, overrides))))
    if cfg.MODEL.DEVICE != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"MODEL.DEVICE {cfg.MODEL.DEVICE}: this machine has no GPU; use cpu")
    return cfg, planned


@contextmanager
def building(what: str) -> Iterator[None]:
    """Context in which KeyErrors and assertions of Detectron2 mean a wrong config: UsageError."""
    try:
        yield
    except (KeyError, AssertionError) as error:
        reason = str(error).strip("'\"") or traceback.extract_tb(error.__traceback__)[-1].line
        raise UsageError(f"the config builds no {what}: {reason}") from error


@contextmanager
def _formulas_as_numbers() -> Iterator[None]:
    """Context in which YAML's ``eval`` tag, as in Detectron2's RetinaNet base, is read as numbers.

    Nothing is executed. Only numbers, arithmetic, lists and ``for x in [...]`` are supported.
    """

    def construct(loader: SafeLoader, node: Node) -> Any:
        (text,) = loader.construct_sequence(node)
        try:
            return _compute(ast.parse(text, mode="eval").body, {})
        except (ArithmeticError, SyntaxError, TypeError, KeyError) as error:
            raise YAMLError(f"{text!r} is no formula of numbers and lists") from error

    SafeLoader.add_constructor(EVAL_TAG, construct)
    try:
        yield
    finally:
        del SafeLoader.yaml_constructors[EVAL_TAG]


def _compute(node: ast.AST, names: Mapping[str, float]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_compute(part, names) for part in parts]
        case ast.UnaryOp(op=ast.USub(), operand=value):
            return -_compute(value, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            values = _compute(left, names), _compute(right, names)
            if max(abs(value) for value in values) > LARGEST:
                raise ArithmeticError("too large")
            return ARITHMETIC[type(op)](*values)
        case ast.ListComp(elt=part, generators=[ast.comprehension(ast.Name(id=name), source, [])]):
            return [_compute(part, {**names, name: v}) for v in _compute(source, names)]
    raise TypeError(type(node).__name__)


def _check_pairs(overrides: Sequence[str]) -> None:
    joined = next((word for word in overrides[::2] if "=" in word), None)
    if joined:
        raise UsageError(f"write {joined.replace('=', ' ', 1)!r}, not {joined!r}: KEY VALUE")
    if len(overrides) % 2:
        pairs = zip(overrides, [*overrides[1:], "SEED"], strict=True)
        alone = next((word for word, after in pairs if IS_KEY(word) and IS_KEY(after)), None)
        what = (
            f"{alone} has no value"
            if alone
            else f"{' '.join(overrides)!r} has an odd number of words"
        )
        raise UsageError(f"overrides must be KEY VALUE pairs: {what}")


def _as_typed(cfg: CfgNode, overrides: Sequence[str]) -> Iterator[str]:
    """Yields the overrides, with whole numbers written as floats where the config has a float."""
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        node = cfg
        for name in key.split("."):
            node = node.get(name) if isinstance(node, CfgNode) else None
        is_whole = isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value)
        yield from (key, value + ".0" if is_whole and isinstance(node, float) else value)


def _merge(cfg: CfgNode, merge: Callable[[], None], where: str = "") -> None:
    """Calls `merge`, and turns yacs' errors into a UsageError that names the file `where`."""
    try:
        merge()
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError, YAMLError) as error:
        text = " ".join(str(error).split())
        if unknown := re.search(r"Non-existent (?:config )?key: ([\w.]+)", text):
            near = difflib.get_close_matches(unknown[1], dict(flatten(cfg)), n=1, cutoff=0.4)
            hint = f"; the nearest is {near[0]}" if near else ""
            text = f"there is no config key {unknown[1]}{hint}"
        elif wrong := re.search(r"'(\w+)'> vs.* values \((.*) vs\. (.*)\) for .*: (\S+)", text):
            kind, default, value, key = wrong.groups()
            text = f"{key} {value} is no {kind}; give one such as {default or repr(default)}"
        raise UsageError(f"{where}: {text}" if where else text) from error


def _add_project_keys(cfg: CfgNode, config_file: str, overrides: Sequence[str]) -> None:
    """Imports the Detectron2 projects that a config file or overrides need, and adds their keys."""
    values = dict(flatten(CfgNode.load_yaml_with_base(config_file))).values()
    named = {*overrides, *(value for value in values if isinstance(value, str))}
    for add_keys, (project, names) in PROJECTS.items():
        if named.intersection(names):
            getattr(import_project(project), add_keys)(cfg)


def import_project(name: str) -> ModuleType:
    """Imports ``detectron2.projects.<name>``, which registers its heads; UsageError if absent."""
    try:
        return importlib.import_module(f"detectron2.projects.{name}")
    except ImportError as error:
        raise UsageError(
            f"this needs detectron2.projects.{name}, which this Detectron2 lacks ({error}): pip "
            "install 'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation"
        ) from error


def take_back_overrides(args: argparse.Namespace, *options: str) -> None:
    """Moves KEY VALUE pairs that multi-word options swallowed back to ``args.opts``, in place."""
    for option in ("image_root", *options):
        words = getattr(args, option, None) or []
        first = next((i for i, word in enumerate(words) if i and IS_KEY(word)), len(words))
        args.opts = [*args.opts, *words[first:]]
        if words:
            setattr(args, option, words[:first])

"""Configs: the keys under ``RESNET_BACKBONE``, which Detectron2 does not have, and what they say;
reading of files and ``KEY VALUE`` overrides, with one line for what is wrong in them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from yaml import Node, SafeLoader, YAMLError

from resnet_backbone.fast.engines import check_engine
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.files import find_config

DEFAULTS = CfgNode(
    {
        # Networks. Depth, stride_in_1x1, norm, out features and RES5_DILATION are Detectron2's
        # MODEL.RESNETS.*; RES2_OUT_CHANNELS follows the depth by itself.
        "SHORTCUT": "B",  # A, B, C, highway, none (plain); paper Table 3
        "ACTIVATION": "relu",  # or prelu
        "RES4_DILATION": 1,  # 2, with MODEL.RESNETS.RES5_DILATION 4, is output stride 8
        "MULTI_GRID": [],  # rates of res5's blocks, e.g. [1, 2, 4] (arXiv 1706.05587)
        "ZERO_INIT_RESIDUAL": False,  # arXiv 1706.02677, 5.1
        "CAFFE_POOL": False,  # pool1 without padding, rounded up, as in the released Caffe nets
        "VGG": {
            "DEPTH": 16,
            "NORM": "",
            "OUT_FEATURES": ["conv5"],  # or conv3, conv4, conv5, pool5 for FPN
        },
        # Weights: what happens to INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and
        # MODEL.RESNETS.STRIDE_IN_1X1, which must be what MODEL.WEIGHTS were trained with.
        # check: other values are an error; set: they get the values of the weights (by the tools,
        # or by resnet_backbone.detection.use_weights_input before the model is built).
        "WEIGHTS_INPUT": "check",
        # The input they were trained on, where a file does not carry it: msra, caffe_vgg or
        # torchvision.
        "WEIGHTS_PREPROCESSING": "",
        # Data
        "CLASS_NAMES": [],  # in order; empty: from the data. Kept with the run and its checkpoints
        "STUFF_CLASS_NAMES": [],  # of label pictures, label 0 first; as CLASS_NAMES
        "TRAIN_ON_DIFFICULT": False,  # VOC's difficult boxes; Faster R-CNN leaves them out
        # Training
        "REFERENCE_BATCH": 0,  # batch that BASE_LR, STEPS, MAX_ITER are meant for; 0: no scaling
        "CHANNELS_LAST": True,  # memory format of the convolutions: faster, same results
        "EPOCHS": 0.0,  # above 0: SOLVER.MAX_ITER is so many passes over the training images
        "EMA_DECAY": 0.0,  # such as 0.9998: evaluations and checkpoints have averaged weights
        "GRADIENT_CHECKPOINTING": False,  # of the backbone: less memory, slower, same gradients
        "ACCUMULATE": 1,  # parts of SOLVER.IMS_PER_BATCH that go through the network in turn
        "BEST_METRIC": "",  # TASK/NAME such as bbox/AP50; its best checkpoint: model_best.pth
        "LOGGERS": [],  # of wandb and mlflow, which get numbers, config and results
        "EARLY_STOP": 0,  # evaluations without a better BEST_METRIC that end a run; 0: never
        # The paper's improvements (appendix B). Global context is part of the trained head, the
        # rest belongs to testing.
        "GLOBAL_CONTEXT": False,  # the whole image's feature beside each region's
        # ImageNet localization (appendix C); see configs/detection/imagenet_loc.
        "LOCALIZATION": {
            "WIDTH": 512,  # channels of the proposal network's 3x3 convolution
            "CENTER_CROP": 0,  # pixels of the center crop that is tested; 0: the whole image
            "SCALES": [],  # short sides of the whole image in testing; empty: as it comes
            "REGION_SIZE": 224,  # pixels of the square that R-CNN warps a proposal to
            "PROPOSALS": "",  # run folder of the proposal network with which R-CNN starts
            "GUESSES": "",  # predictions.csv of evaluate-classifier, for the top-5 error
        },
        "TEST": {
            # imagenet_det: AP with ILSVRC's thresholds of small objects; localization: its error;
            # empty: that of the data set (VOC, COCO)
            "METRIC": "",
            "OPERATING_POINTS": False,  # best score thresholds, confusion matrix: in results.json
            "BOX_REFINEMENT": False,  # pool again at the regressed boxes, NMS at .3, box voting
            "SCALES": [],  # short sides, e.g. [200, 400, 600, 800, 1000]: maxout over two of them
            "FLIP": False,  # the mirrored image too; scores and boxes are averaged
            # agnostic: over all classes together; or soft-NMS (arXiv 1704.04503): linear, gaussian
            "NMS": "hard",
            "ENSEMBLE": [],  # run folders of further detectors: proposals and scores united
            # Of evaluations and predictions, on CPUs and GPUs: float32, mixed precision in bfloat16
            # or float16, or with ENGINE openvino int8. SOLVER.AMP is training's.
            "PRECISION": "float32",
            "CALIBRATION": "",  # for int8: a folder of images like those to come, 128 of them
            # eager, compile, openvino, onnxruntime, or auto, which measures and takes the fastest:
            # what runs backbone and heads (resnet_backbone.optimize_for_inference)
            "ENGINE": "eager",
        },
    }
)

CHOICES = {
    "NMS": ("hard", "agnostic", "linear", "gaussian"),
    "PRECISION": ("float32", "bfloat16", "float16", "int8"),
}
KEY = "RESNET_BACKBONE.TEST"

DEEPLAB_BACKBONE = "build_paper_resnet_deeplab_backbone"
DEEPLAB_HEADS = ("DeepLabV3Head", "DeepLabV3PlusHead")

CONTEXT_HEADS = {"PaperRes5ROIHeads": "ContextRes5ROIHeads", "StandardROIHeads": "ContextROIHeads"}
"""MODEL.ROI_HEADS.NAME -> the same heads with global context."""

PROJECTS = {
    "add_deeplab_config": ("deeplab", (*DEEPLAB_HEADS, DEEPLAB_BACKBONE, "WarmupPolyLR")),
    "add_pointrend_config": (
        "point_rend",
        ("PointRendROIHeads", "PointRendMaskHead", "PointRendSemSegHead"),
    ),
}
"""Function that adds keys -> its module in ``detectron2.projects``, names that ask for it."""
EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
LARGEST = 1e6  # number in a formula
IS_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR|VIS_PERIOD").fullmatch

# Detectron2 causes these; a user of the tools can do nothing about them.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def add_resnet_backbone_config(cfg: CfgNode) -> CfgNode:
    """Adds the node ``RESNET_BACKBONE`` with its defaults to a Detectron2 config, in place."""
    cfg.RESNET_BACKBONE = DEFAULTS.clone()
    return cfg


def backbone_node(cfg: CfgNode) -> CfgNode:
    """The node, or its defaults for a config that was made without it."""
    return cfg.get("RESNET_BACKBONE", DEFAULTS)


def flat_config(node: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config, or of its nested dicts, by dotted key."""
    return {key.replace("/", "."): value for key, value in flatten_results_dict(node).items()}


def seed_of(cfg: CfgNode) -> int:
    """``SEED``; where it is negative one that is drawn, the same for all processes."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def with_keys(cfg: CfgNode, *pairs) -> CfgNode:
    """A copy of a config with other values, given as KEY, value, KEY, ...; frozen if it is."""
    copy = cfg.clone()
    copy.defrost()
    copy.merge_from_list(list(pairs))
    if cfg.is_frozen():
        copy.freeze()
    return copy


class Switches(NamedTuple):
    """``RESNET_BACKBONE.TEST.*``."""

    refinement: bool = False  # of boxes
    scales: tuple[int, ...] = ()  # short sides in pixels, ascending; empty: the test scale alone
    flip: bool = False  # the mirrored image too
    nms: str = "hard"  # one of CHOICES["NMS"]
    ensemble: tuple[str, ...] = ()  # run folders of further detectors


def read_switches(cfg: CfgNode) -> Switches:
    """The switches; UsageError where they contradict one another or the detector's kind."""
    node = backbone_node(cfg).TEST
    try:
        check_engine(node.ENGINE, read_precision(cfg))
    except ValueError as error:
        raise UsageError(f"{KEY}.ENGINE: {error}") from error
    check_scales(cfg, node.SCALES)
    scales, runs = tuple(sorted(node.SCALES)), tuple(node.ENSEMBLE)
    switches = Switches(node.BOX_REFINEMENT, scales, node.FLIP, _choice(cfg, "NMS"), runs)
    is_improved = switches != Switches()
    if cfg.TEST.AUG.ENABLED and is_improved:
        raise UsageError(
            f"TEST.AUG.ENABLED (Detectron2's union of detections) excludes {KEY}.* (the paper's "
            "improvements): turn one of them off"
        )
    has_regions = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    if (is_improved or cfg.TEST.AUG.ENABLED) and not has_regions:
        raise UsageError(
            f"{KEY}.* and TEST.AUG need GeneralizedRCNN, but "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: turn them off"
        )
    return switches


def read_precision(cfg: CfgNode) -> torch.dtype:
    """``RESNET_BACKBONE.TEST.PRECISION``; UsageError where something that it needs is missing."""
    name, pooler = _choice(cfg, "PRECISION"), cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE
    if name != "float32" and pooler == "ROIPool" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        hint = "MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIPool supports only float32 on CPUs"
        raise UsageError(f"{KEY}.PRECISION {name}: {hint}")
    if (name == "int8") != bool(backbone_node(cfg).TEST.CALIBRATION):
        hint = "int8 and CALIBRATION, a folder of images, need each other"
        raise UsageError(f"{KEY}.PRECISION {name}: {hint}")
    return getattr(torch, name)


def _choice(cfg: CfgNode, key: str) -> str:
    value = backbone_node(cfg).TEST[key]
    if value not in CHOICES[key]:
        raise UsageError(f"{KEY}.{key} {value!r} is not one of {', '.join(CHOICES[key])}")
    return value


def check_scales(cfg: CfgNode, scales: Sequence[int]) -> None:
    """Raises UsageError for invalid scales, and for a detector without a test scale."""
    whole = all(isinstance(scale, int) and scale > 0 for scale in scales)
    if not whole or len(set(scales)) < len(scales):
        hint = "give short sides in whole pixels, each once, such as [200, 400, 600, 800, 1000]"
        raise UsageError(f"{KEY}.SCALES {list(scales)}: {hint}")
    if scales and cfg.INPUT.MIN_SIZE_TEST <= 0:
        raise UsageError(f"{KEY}.SCALES needs INPUT.MIN_SIZE_TEST above 0, the proposals' scale")


def load_config(config_file: str, overrides: Sequence[str]) -> CfgNode:
    """Detectron2's defaults + ours + a YAML file + ``KEY VALUE`` pairs.

    The file is a path, or a name of ours as in :func:`find_config`. UsageError: no such file; no
    such key, a wrong type, ``key=value`` for ``KEY VALUE``.
    """
    return load_configs(config_file, overrides)[0]


def load_configs(config_file: str, overrides: Sequence[str]) -> tuple[CfgNode, CfgNode]:
    """The config of :func:`load_config`, and the same without the overrides."""
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
def _formulas_as_numbers() -> Iterator[None]:
    """Inside, YAML's tag of ``eval``, which Detectron2's RetinaNet base has, is read as numbers.

    Nothing is executed: of Python there are numbers, arithmetic, lists and ``for x in [...]``.
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
    """The overrides with whole numbers written as floats where the config has a float."""
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        node = cfg
        for name in key.split("."):
            node = node.get(name) if isinstance(node, CfgNode) else None
        is_whole = re.fullmatch(r"[+-]?\d+", value)
        yield from (key, value + ".0" if is_whole and isinstance(node, float) else value)


def _merge(cfg: CfgNode, merge: Callable[[], None], where: str = "") -> None:
    """Calls `merge`; a UsageError, with the file `where` it is, says what yacs refuses."""
    try:
        merge()
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError, YAMLError) as error:
        text = " ".join(str(error).split())
        if unknown := re.search(r"Non-existent (?:config )?key: ([\w.]+)", text):
            near = difflib.get_close_matches(unknown[1], flat_config(cfg), n=1, cutoff=0.4)
            hint = f"; the nearest is {near[0]}" if near else ""
            text = f"there is no config key {unknown[1]}{hint}"
        elif wrong := re.search(r"'(\w+)'> vs.* values \((.*) vs\. (.*)\) for .*: (\S+)", text):
            kind, default, value, key = wrong.groups()
            text = f"{key} {value} is no {kind}; give one such as {default or repr(default)}"
        raise UsageError(f"{where}: {text}" if where else text) from error


def _add_project_keys(cfg: CfgNode, config_file: str, overrides: Sequence[str]) -> None:
    """Registers Detectron2's projects that a config file or overrides name, and adds their keys."""
    values = flat_config(CfgNode.load_yaml_with_base(config_file)).values()
    named = {*overrides, *(value for value in values if isinstance(value, str))}
    for add_keys, (project, names) in PROJECTS.items():
        if named.intersection(names):
            getattr(import_project(project), add_keys)(cfg)


def import_project(name: str) -> ModuleType:
    """``detectron2.projects.<name>``; importing registers its heads. UsageError: it is absent."""
    try:
        return importlib.import_module(f"detectron2.projects.{name}")
    except ImportError as error:
        raise UsageError(
            f"this needs detectron2.projects.{name}, which this Detectron2 lacks ({error}): pip "
            "install 'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation"
        ) from error


def take_back_overrides(args: argparse.Namespace, *options: str) -> None:
    """Gives KEY VALUE pairs behind options with several words back to the config, in place."""
    for option in ("image_root", *options):
        words = getattr(args, option, None) or []
        first = next((i for i, word in enumerate(words) if i and IS_KEY(word)), len(words))
        args.opts = [*args.opts, *words[first:]]
        if words:
            setattr(args, option, words[:first])

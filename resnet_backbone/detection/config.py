"""Config keys that Detectron2 does not have, all under the node ``RESNET_BACKBONE``."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.utils import comm

from resnet_backbone.runtime.errors import UsageError

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
        "ACCUMULATE": 1,  # parts of SOLVER.IMS_PER_BATCH that go through the network in turn
        "BEST_METRIC": "",  # TASK/NAME such as bbox/AP50; its best checkpoint: model_best.pth
        "EARLY_STOP": 0,  # evaluations without a better BEST_METRIC that end a run; 0: never
        # The paper's improvements (appendix B). Global context is part of the trained head, the
        # rest belongs to testing.
        "GLOBAL_CONTEXT": False,  # the whole image's feature beside each region's
        "TEST": {
            "BOX_REFINEMENT": False,  # pool again at the regressed boxes, NMS at .3, box voting
            "SCALES": [],  # short sides, e.g. [200, 400, 600, 800, 1000]: maxout over two of them
            "FLIP": False,  # the mirrored image too; scores and boxes are averaged
            "NMS": "hard",  # or soft-NMS (arXiv 1704.04503): linear, gaussian
            "ENSEMBLE": [],  # run folders of further detectors: proposals and scores united
            # Of evaluations and predictions, on CPUs and GPUs: float32, or mixed precision in
            # bfloat16 or float16. SOLVER.AMP is training's.
            "PRECISION": "float32",
        },
    }
)


CONTEXT_HEADS = {
    "PaperRes5ROIHeads": "ContextRes5ROIHeads",
    "StandardROIHeads": "ContextROIHeads",
}
"""MODEL.ROI_HEADS.NAME -> the same heads with global context."""


def add_resnet_backbone_config(cfg: CfgNode) -> CfgNode:
    """Adds the node ``RESNET_BACKBONE`` with its defaults to a Detectron2 config, in place."""
    cfg.RESNET_BACKBONE = DEFAULTS.clone()
    return cfg


def backbone_node(cfg: CfgNode) -> CfgNode:
    """The node, or its defaults for a config that was made without it."""
    return cfg.get("RESNET_BACKBONE", DEFAULTS)


def seed_of(cfg: CfgNode) -> int:
    """``SEED``; where it is negative one that is drawn, the same for all processes."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    """A copy of a config with another ``SEED``, frozen if it is."""
    copy = cfg.clone()
    copy.defrost()
    copy.SEED = seed
    if cfg.is_frozen():
        copy.freeze()
    return copy


def refuse_ignored_context(cfg: CfgNode) -> None:
    """Raises UsageError where ``GLOBAL_CONTEXT`` is set and the region heads would not have it."""
    name = cfg.MODEL.ROI_HEADS.NAME
    if backbone_node(cfg).GLOBAL_CONTEXT and name not in CONTEXT_HEADS.values():
        raise UsageError(
            f"RESNET_BACKBONE.GLOBAL_CONTEXT: MODEL.ROI_HEADS.NAME {name} has none; build the "
            "model from with_global_context(cfg) of resnet_backbone.detection, as the tools here do"
        )

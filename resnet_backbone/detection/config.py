"""Config keys that Detectron2 does not have, all under the node ``RESNET_BACKBONE``."""

from __future__ import annotations

from detectron2.config import CfgNode


class UsageError(ValueError):
    """A command line or config that cannot be meant; the message says what to write."""


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
        # or by resnet_backbone.detection.take_over before the model is built).
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
    }
)


def add_resnet_backbone_config(cfg: CfgNode) -> CfgNode:
    """Adds the node ``RESNET_BACKBONE`` with its defaults to a Detectron2 config, in place."""
    cfg.RESNET_BACKBONE = DEFAULTS.clone()
    return cfg


def backbone_node(cfg: CfgNode) -> CfgNode:
    """The node, or its defaults for a config that was made without it."""
    return cfg.get("RESNET_BACKBONE", DEFAULTS)

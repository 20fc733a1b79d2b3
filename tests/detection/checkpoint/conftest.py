"""Fixtures of the tests of checkpoints."""

import pytest

# What Detectron2's defaults are: the configs name weights, whose input is another.
DEFAULTS = dict(INPUT__FORMAT="BGR", MODEL__WEIGHTS="", MODEL__RESNETS__STRIDE_IN_1X1=True)
DEFAULTS |= dict(MODEL__PIXEL_MEAN=[103.53, 116.28, 123.675], MODEL__PIXEL_STD=[1.0, 1.0, 1.0])


@pytest.fixture
def make_cfg(make_cfg):
    """As in the folder above, with Detectron2's input and no weights."""
    return lambda file=None, node=True, **keys: make_cfg(file, node, **(DEFAULTS | keys))


@pytest.fixture
def detector(make_cfg, small):
    """Function (config file, KEY=value...) -> a small detector with small heads."""
    from detectron2.modeling import build_model

    R18 = "voc/faster_rcnn_R_18_FPN.yaml"
    return lambda file=R18, **keys: build_model(make_cfg(file, **(small | keys)))

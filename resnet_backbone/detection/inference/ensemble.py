"""Further detectors of an ensemble, from their run folders."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from detectron2.config import CfgNode
from torch import nn

from resnet_backbone.detection.config import UsageError, backbone_node
from resnet_backbone.detection.inference.switches import check_scales


def find_weights(run: str) -> str:
    """``model_final.pth`` of a run, or its last checkpoint while it is not finished.

    Raises:
        UsageError: there is neither.
    """
    final, last = os.path.join(run, "model_final.pth"), os.path.join(run, "last_checkpoint")
    if os.path.isfile(final):
        return final
    if os.path.isfile(last):
        with open(last) as file:
            return os.path.join(run, os.path.basename(file.read().strip()))
    raise UsageError(f"{run}: no model_final.pth and no checkpoint there; name a train_net.py run")


def run_config(run: str, overrides: list[str]) -> CfgNode:
    """The config of a run with its weights in ``MODEL.WEIGHTS``.

    Args:
        run: a folder that tools/train_net.py wrote.
        overrides: ``KEY VALUE`` pairs.

    Raises:
        UsageError: no run there, or no weights in it yet.
    """
    from resnet_backbone.detection.engine.command_line import (
        load_config,  # imports what imports this package
    )

    config = os.path.join(run, "config.yaml")
    if not os.path.isfile(config):
        raise UsageError(f"{run}: no config.yaml there; name a folder that train_net.py wrote")
    return load_config(config, [*overrides, "MODEL.WEIGHTS", find_weights(run)])


def check_ensemble(cfg: CfgNode) -> None:
    """:func:`check_member` for the runs of ``TEST.ENSEMBLE``, before hours of training.

    Raises:
        UsageError: naming the run.
    """
    for run in backbone_node(cfg).TEST.ENSEMBLE:
        check_member(cfg, run_config(run, []), run)


_kept: ContextVar[dict[str, tuple[CfgNode, nn.Module]] | None] = ContextVar("kept", default=None)


@contextmanager
def keep_members() -> Iterator[None]:
    """Inside, :func:`load_run` reads each run once; what it read waits in the CPU's memory.

    For trainings with several evaluations: one at a time may use the detectors.
    """
    before = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(before)


def load_run(run: str, cfg: CfgNode) -> tuple[CfgNode, nn.Module]:
    """The config and the detector of a run, in evaluation mode on the device of `cfg`.

    Raises: see :func:`read_run`.
    """
    kept = _kept.get()
    if kept is None:
        return read_run(run, cfg)
    if run not in kept:
        other, model = read_run(run, cfg)
        kept[run] = other, model.cpu()
    other, model = kept[run]
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    return other, (model if on_cpu else copy.deepcopy(model).to(cfg.MODEL.DEVICE)).eval()


def read_run(run: str, cfg: CfgNode) -> tuple[CfgNode, nn.Module]:
    """What :func:`load_run` gives, from the run's files.

    Raises:
        UsageError, WeightsError: no run there, see :func:`check_member`, or weights that do not
            fit the run's config.
    """
    from resnet_backbone.detection.checkpoint.input_check import prepare_weights
    from resnet_backbone.detection.engine.trainer import Trainer
    from resnet_backbone.detection.inference.predictor import load_detector

    other = run_config(run, ["MODEL.DEVICE", cfg.MODEL.DEVICE])
    check_member(cfg, other, run)
    prepare_weights(other)
    model = Trainer.build_model(other)
    load_detector(other, model)
    return other, model.eval()


def check_member(cfg: CfgNode, other: CfgNode, run: str) -> None:
    """Refuses a detector of other classes, or one whose images cannot be made from ours.

    Raises:
        UsageError: naming the run.
    """
    counts = [config.MODEL.ROI_HEADS.NUM_CLASSES for config in (cfg, other)]
    names = [list(config.RESNET_BACKBONE.CLASS_NAMES) for config in (cfg, other)]
    if counts[0] != counts[1] or names[0] != names[1]:
        raise UsageError(
            f"{run} has {counts[1]} classes {names[1]}, this detector has {counts[0]} "
            f"{names[0]}: all need the same in the same order"
        )
    if other.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UsageError(f"{run} is a {other.MODEL.META_ARCHITECTURE}, not GeneralizedRCNN")
    check_scales(other, list(cfg.RESNET_BACKBONE.TEST.SCALES))
    for config, where in ((cfg, "this detector"), (other, run)):
        if config.INPUT.FORMAT not in ("RGB", "BGR"):
            raise UsageError(f"INPUT.FORMAT of {where} is {config.INPUT.FORMAT!r}, not RGB or BGR")

"""Detectron2's trainer with safe loading, CPU mixed precision, our data and our evaluation."""

from __future__ import annotations

import logging
import os
import sys

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from torch import nn
from tqdm import tqdm

from resnet_backbone.detection.checkpoint import Checkpointer
from resnet_backbone.detection.evaluation import build_evaluator
from resnet_backbone.detection.handover import with_weights_input
from resnet_backbone.detection.projects import import_project
from resnet_backbone.detection.segmentation import mapper_options

logger = logging.getLogger(__name__)


class TolerantMapper(DatasetMapper):
    """:class:`DatasetMapper` that replaces an image which became unreadable during training.

    The image read before it, augmented anew, takes its place; where there is none yet,
    Detectron2's loader draws another one. In evaluation nothing is replaced: the error names the
    file.
    """

    _spare: dict | None = None

    def __call__(self, dataset_dict: dict) -> dict | None:
        try:
            mapped = super().__call__(dataset_dict)
        except Exception as error:
            where = dataset_dict["file_name"]
            if not self.is_train:
                raise OSError(f"{where}: cannot be read ({error})") from error
            logger.warning("%s: left out of training, cannot be read (%s)", where, error)
            return None if self._spare is None else super().__call__(self._spare)
        self._spare = dataset_dict
        return mapped


def uses_cpu_autocast(cfg: CfgNode) -> bool:
    return cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu"


class AutocastModel(nn.Module):
    """Runs a detector under bf16 autocast on the CPU; Detectron2's AMPTrainer is CUDA-only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(inputs)


class ProgressBar(HookBase):
    """A bar with losses, rate and the time left; for terminals."""

    def before_train(self) -> None:
        self.bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, unit="it", smoothing=0.1
        )

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        losses = {k: f"{v[0]:.3f}" for k, v in latest.items() if "loss" in k}
        self.bar.set_postfix(losses, refresh=False)
        self.bar.update()

    def after_train(self) -> None:
        self.bar.close()


class Trainer(DefaultTrainer):
    """Trains and evaluates a detector with one of our backbones from a config.

    What differs from :class:`DefaultTrainer`: weights are checked against the config when they
    are loaded, ``SOLVER.AMP`` works on CPUs (bf16), convolutions run in channels_last, VOC and
    COCO data sets bring their evaluator, unreadable images do not end a run. With
    ``RESNET_BACKBONE.WEIGHTS_INPUT`` "set", the config's input keys follow ``MODEL.WEIGHTS``.
    """

    def __init__(self, cfg: CfgNode):
        cfg = with_weights_input(cfg)
        plain = cfg.clone()
        plain.defrost()
        plain.SOLVER.AMP.ENABLED = cfg.SOLVER.AMP.ENABLED and not uses_cpu_autocast(cfg)
        super().__init__(plain)
        self.cfg = cfg
        if uses_cpu_autocast(cfg):
            self.model = AutocastModel(self.model)  # for the steps; checkpoints hold the bare one

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        logger.info("%s with %.1f M parameters", cfg.MODEL.BACKBONE.NAME, millions)
        if cfg.RESNET_BACKBONE.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        mapper = TolerantMapper(cfg, True, **mapper_options(cfg))
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(cfg, dataset_name, mapper=TolerantMapper(cfg, False))

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR":
            return import_project("deeplab").build_lr_scheduler(cfg, optimizer)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name.replace("/", "_"))
        return build_evaluator(dataset_name, folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None):
        if uses_cpu_autocast(cfg) and not isinstance(model, AutocastModel):
            model = AutocastModel(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_checkpointer(cls, cfg: CfgNode, model: nn.Module, **checkpointables) -> Checkpointer:
        return Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            preprocessing=cfg.RESNET_BACKBONE.WEIGHTS_PREPROCESSING,
            class_names=[*cfg.RESNET_BACKBONE.CLASS_NAMES, *cfg.RESNET_BACKBONE.STUFF_CLASS_NAMES],
            **checkpointables,
        )

    def build_hooks(self) -> list[HookBase | None]:
        made: DetectionCheckpointer = self.checkpointer  # by DefaultTrainer; ours takes its place
        self.checkpointer = self.build_checkpointer(self.cfg, made.model, **made.checkpointables)
        hooks = super().build_hooks()
        if comm.is_main_process() and sys.stderr.isatty():
            hooks.append(ProgressBar())
        return hooks

    def build_writers(self) -> list:
        writers = [
            JSONWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")),
            TensorboardXWriter(self.cfg.OUTPUT_DIR),
        ]
        return writers if sys.stderr.isatty() else [CommonMetricPrinter(self.max_iter), *writers]

    @property
    def results(self) -> dict:
        """The last evaluation of a run, by task: {"bbox": {"AP50": percent, ...}}."""
        return getattr(self, "_last_eval_results", {})

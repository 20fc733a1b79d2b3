"""What a checkpoint is here: tensors that say of which network they are and what input it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from resnet_backbone.models import StagedNetwork, build_model
from resnet_backbone.weights.preprocessing import Preprocessing


@dataclass(frozen=True)
class ModelSpec:
    """Which network weights belong to: enough to build it again.

    Attributes:
        name: of ``list_models()`` (or ``cifar_resnet<6n+2>``); ``torchvision/<name>`` or
            ``timm/<name>`` for networks of those libraries.
        num_classes: logits of the head; None for weights without head.
        options: constructor arguments, for example ``{"shortcut": "B", "stride_in_1x1": True}``.
    """

    name: str
    num_classes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, **options: Any) -> StagedNetwork:
        """Builds the network of this package with freshly initialised weights.

        Args:
            **options: constructor arguments added to the specification's own, for example
                ``out_features``.
        """
        return build_model(self.name, self.num_classes, **{**self.options, **options})


@dataclass(frozen=True)
class Origin:
    """Where weights came from.

    Attributes:
        format: the layout of the source: "torchvision", "caffe2", ...
        file: the source's path, URL or name.
        sha256: of the source file; empty for a sharded one.
        run: the training run that wrote it.
        reference: where its preprocessing is written down.
    """

    format: str = ""
    file: str = ""
    sha256: str = ""
    run: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one network, whole: what :func:`read_checkpoint` returns.

    Attributes:
        tensors: name -> tensor under this package's key names, with the file's dtypes and without
            ``num_batches_tracked``.
        model: the network.
        preprocessing: the input that it was trained on.
        origin: where it came from.
    """

    tensors: dict[str, Tensor]
    model: ModelSpec
    preprocessing: Preprocessing
    origin: Origin = Origin()

"""What a checkpoint is here: tensors that say of which network they are and what input it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from resnet_backbone.fast import build_model
from resnet_backbone.models import StagedNetwork
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

        Raises:
            ValueError: unknown name (with the nearest one) or option.
        """
        options = {**self.options, **options}
        try:
            return build_model(self.name, self.num_classes, **options)
        except TypeError as error:
            raise ValueError(f"model.options {options}: {error}") from error

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The network that metadata describe.

        Raises:
            ValueError: the text is not what :meth:`to_json` writes.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            raise ValueError("it has no network name")
        classes, options = found.get("num_classes"), found.get("options", {})
        if classes is not None and (type(classes) is not int or classes < 1):
            raise ValueError(f"num_classes {classes!r} is not a number of classes")
        if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
            raise ValueError(f"options {options!r} are not constructor arguments")
        for key in ("stride_in_1x1", "caffe_pool"):
            if not isinstance(options.get(key, False), bool):
                raise ValueError(f"{key} {options[key]!r} is not true or false")
        return cls(found["name"], classes, options)


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

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Origin:
        """The origin that metadata describe.

        Raises:
            ValueError: the text is not what :meth:`to_json` writes.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
            raise ValueError("it is not an object of texts")
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(str(error)) from error


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

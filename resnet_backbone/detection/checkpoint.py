"""Detectron2's checkpointer with safetensors backbones, and a check of their input."""

from __future__ import annotations

import os

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from resnet_backbone.models import StagedNetwork
from resnet_backbone.weights.files import check_architecture, load_tensors, read_weights
from resnet_backbone.weights.preprocessing import (
    Preprocessing,
    WeightsError,
    same_mean,
    same_std,
)


def _networks(model: nn.Module) -> list[StagedNetwork]:
    return [module for module in model.modules() if isinstance(module, StagedNetwork)]


def find_network(model: nn.Module) -> StagedNetwork:
    """The one network of this package inside a detector."""
    for network in _networks(model):
        return network
    raise WeightsError(
        "this detector has none of our backbones: set MODEL.BACKBONE.NAME, for example to "
        "build_paper_resnet_fpn_backbone"
    )


def describe_input(model: nn.Module) -> Preprocessing | None:
    """The input that a Detectron2 meta-architecture feeds its backbone.

    None if it does not say, or if the backbone is not one of ours.
    """
    mean = getattr(model, "pixel_mean", None)
    if mean is None or getattr(model, "input_format", None) not in ("RGB", "BGR"):
        return None
    if not _networks(model):
        return None
    return Preprocessing(
        model.input_format,
        255.0,
        tuple(mean.flatten().tolist()),
        tuple(model.pixel_std.flatten().tolist()),
        stride_in_1x1=getattr(find_network(model), "stride_in_1x1", None),
        source="a Detectron2 config",
    )


def check_input(model: nn.Module, expected: Preprocessing, where: str) -> None:
    """Refuses weights that were trained on other input than this detector gives them.

    Raises:
        WeightsError: naming the config key, its value and the right one.
    """
    network, actual = find_network(model), describe_input(model)
    if actual is None:
        raise WeightsError(f"{where}: INPUT.FORMAT must be RGB or BGR to use these weights")
    wrong = []
    if actual.channel_order != expected.channel_order:
        wrong.append(("INPUT.FORMAT", actual.channel_order, expected.channel_order))
    mean, std = expected.pixel_mean_255(), expected.pixel_std_255()
    if not same_mean(actual.mean, mean):
        wrong.append(("MODEL.PIXEL_MEAN", _numbers(actual.mean), _numbers(mean)))
    if not same_std(actual.std, std):
        wrong.append(("MODEL.PIXEL_STD", _numbers(actual.std), _numbers(std)))
    if wrong:
        found = ", ".join(f"{key} is {have}" for key, have, _ in wrong)
        mend = " ".join(f'{key} "{want}"' for key, _, want in wrong)
        raise WeightsError(f"{where} was trained on other input: {found}; set {mend}")
    check_architecture(network, expected, where)


def _numbers(values) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"


class Checkpointer(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` that also reads our ``.safetensors`` backbones.

    Checkpoints that it writes carry their preprocessing, and loading one into a detector with
    other input settings or another stride is refused. Files of other origins load as in
    Detectron2.

    Args:
        preprocessing: see :func:`resnet_backbone.weights.read_weights`.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, preprocessing: str = "", **kwargs):
        super().__init__(model, save_dir, **kwargs)
        self.preprocessing = preprocessing

    def save(self, name: str, **kwargs) -> None:
        described = describe_input(self._bare_model())
        if described is not None:
            kwargs["preprocessing"] = described.to_json()
        super().save(name, **kwargs)

    def load(self, path: str, *args, **kwargs):
        if path and path.endswith(".safetensors"):
            local = self.path_manager.get_local_path(path)
            load_backbone(self._bare_model(), local, self.preprocessing)
            self.logger.info(f"Loaded the backbone from {path}")
            return {}
        file = path.partition("?")[0] if path else ""  # a query belongs to DetectionCheckpointer
        if file and "://" not in file and not os.path.isfile(file):
            raise WeightsError(f"{file}: no such file; check MODEL.WEIGHTS or the path")
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint):
        described = checkpoint.pop("preprocessing", None)
        if isinstance(described, str):
            check_input(self._bare_model(), Preprocessing.from_json(described), "the checkpoint")
        return super()._load_model(checkpoint)

    def _bare_model(self) -> nn.Module:
        return getattr(self.model, "module", self.model)  # inside DistributedDataParallel


def load_backbone(model: nn.Module, path: str, preprocessing: str = "") -> None:
    """Loads ImageNet weights into a detector: backbone, C4's res5, VGG's fc6 and fc7.

    Raises:
        WeightsError: input or stride mismatch, missing or wrongly shaped tensors. The detector
            is unchanged then.
    """
    tensors, expected = read_weights(path, preprocessing)
    check_input(model, expected, path)
    head = _head_tensors(model, tensors, path)
    load_tensors(find_network(model), tensors, path)
    model.load_state_dict(head, strict=False)


def _head_tensors(model: nn.Module, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Tensors for the layers that a detector keeps in its region head."""
    own = model.state_dict()
    head = {}
    for key in own:
        for source, target in (
            ("res5.", "roi_heads.res5."),
            ("fc6.", "roi_heads.box_head.fc6."),
            ("fc7.", "roi_heads.box_head.fc7."),
        ):
            if not key.startswith(target) or key.endswith("num_batches_tracked"):
                continue
            value = tensors.get(source + key[len(target) :])
            if value is None and source == "res5.":
                raise WeightsError(
                    f"{path} lacks {key[len(target) - len(source) :]} of the C4 head"
                )
            if value is not None and value.shape != own[key].shape:
                raise WeightsError(
                    f"{path}: {source}* has shape {tuple(value.shape)}, the head needs "
                    f"{tuple(own[key].shape)} ({key})"
                )
            if value is not None:
                head[key] = value
    return head

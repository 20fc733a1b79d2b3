"""Detectron2's checkpointer with safetensors backbones, and a check of their input."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from resnet_backbone.models import StagedNetwork
from resnet_backbone.weights.files import check_architecture, load_tensors, read_weights
from resnet_backbone.weights.preprocessing import (
    Preprocessing,
    WeightsError,
    get_preprocessing,
    same_mean,
    same_std,
)

logger = logging.getLogger(__name__)

# Where a path says what the weights expect (Detectron2's model zoo, ImageNet section).
KNOWN_ORIGINS = {
    "ImageNetPretrained/MSRA/": "msra",
    "ImageNetPretrained/torchvision/": "torchvision",
}

# Layers of the ImageNet networks that a detector runs per region.
HEAD_LAYERS = {
    "roi_heads.res5.": "res5.",
    "roi_heads.box_head.fc6.": "fc6.",
    "roi_heads.box_head.fc7.": "fc7.",
}


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
    mean, networks = getattr(model, "pixel_mean", None), _networks(model)
    if mean is None or getattr(model, "input_format", None) not in ("RGB", "BGR") or not networks:
        return None
    return Preprocessing(
        model.input_format,
        255.0,
        tuple(mean.flatten().tolist()),
        tuple(model.pixel_std.flatten().tolist()),
        stride_in_1x1=getattr(networks[0], "stride_in_1x1", None),
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

    Checkpoints that it writes carry their preprocessing and class names; loading one into a
    detector with other input settings or another stride is refused, and so is resuming or
    evaluating it with other classes. Files of other origins load as in Detectron2, but must fill
    the whole backbone, and are checked where their preprocessing is named or known.

    Args:
        preprocessing: see :func:`resnet_backbone.weights.read_weights`.
        class_names: of the detector, in order; empty: not known, not checked.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        preprocessing: str = "",
        class_names: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(model, save_dir, **kwargs)
        self.preprocessing = preprocessing
        self.class_names = list(class_names)

    def save(self, name: str, **kwargs) -> None:
        described = describe_input(self.model)
        if described is not None:
            kwargs["preprocessing"] = described.to_json()
        super().save(name, class_names=self.class_names, **kwargs)

    def load(self, path: str, checkpointables: list[str] | None = None):
        """Loads a file; ``checkpointables=[]`` means weights to start from, of any classes."""
        if path and path.endswith(".safetensors"):
            local = self.path_manager.get_local_path(path)
            load_backbone(self.model, local, self.preprocessing)
            self.logger.info(f"Loaded the backbone from {path}")
            return {}
        file = path.partition("?")[0] if path else ""  # a query belongs to DetectionCheckpointer
        if file and "://" not in file and not os.path.isfile(file):
            raise WeightsError(f"{file}: no such file; check MODEL.WEIGHTS or the path")
        self._loading, self._same_classes = path, checkpointables is None
        return super().load(path, checkpointables)

    def _load_model(self, checkpoint):
        model, path = self.model, self._loading
        described = checkpoint.pop("preprocessing", None)
        known = self.preprocessing or next((v for k, v in KNOWN_ORIGINS.items() if k in path), "")
        if isinstance(described, str):
            check_input(model, Preprocessing.from_json(described), path)
        elif known:
            check_input(model, get_preprocessing(known), path)
        classes = checkpoint.pop("class_names", None) or self.class_names
        if self._same_classes and self.class_names and classes != self.class_names:
            raise WeightsError(
                f"{path} was trained on the classes {classes}, these data have "
                f"{self.class_names}: use the config.yaml of its run, or set "
                "RESNET_BACKBONE.CLASS_NAMES to its classes"
            )
        incompatible = super()._load_model(checkpoint)
        _refuse_incomplete(model, incompatible, path)
        return incompatible


def _refuse_incomplete(model: nn.Module, incompatible, path: str) -> None:
    """A backbone that keeps random layers after loading would train to something poor, silently."""
    prefixes = [name for name, child in model.named_modules() if isinstance(child, StagedNetwork)]
    layers = tuple(f"{name}." for name in (*prefixes, "roi_heads.res5"))
    # Detectron1's files have the statistics folded into scale and shift
    not_needed = ("num_batches_tracked", "running_mean", "running_var")
    lacking = [*incompatible.missing_keys, *(k for k, *_ in incompatible.incorrect_shapes)]
    lacking = [k for k in lacking if k.startswith(layers) and not k.endswith(not_needed)]
    if lacking:
        raise WeightsError(
            f"{path} does not fill the backbone: {len(lacking)} tensors are missing or of another "
            f"shape, such as {lacking[0]}; is it another depth, or another library's file? "
            "(torchvision's: save it as .safetensors, see README, Weights)"
        )


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
    head = {}
    for key, own in model.state_dict().items():
        target = next((prefix for prefix in HEAD_LAYERS if key.startswith(prefix)), None)
        if target is None or key.endswith("num_batches_tracked"):
            continue
        source = HEAD_LAYERS[target] + key[len(target) :]
        if source not in tensors:
            if source.startswith("res5."):
                raise WeightsError(f"{path} lacks {source}, a layer of the C4 head")
            logger.warning("%s has no %s: this layer starts at random", path, source)
        elif tensors[source].shape != own.shape:
            raise WeightsError(
                f"{path}: {source} has shape {tuple(tensors[source].shape)}, the head needs "
                f"{tuple(own.shape)} ({key})"
            )
        else:
            head[key] = tensors[source]
    return head

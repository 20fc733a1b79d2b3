"""Backbones for torchvision's detectors and its DeepLabV3.

torchvision's detectors normalize RGB images in 0..1 with ``image_mean`` and ``image_std``, whose
defaults are right for torchvision's weights only. So :func:`fpn_backbone` converts the weights to
this input and returns the normalization with the backbone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from resnet_backbone.adapters import build_backbone, image_normalization
from resnet_backbone.models import StagedNetwork
from resnet_backbone.models.resnet import DILATIONS
from resnet_backbone.weights import Preprocessing
from resnet_backbone.weights.load import stride_of

RESNET_LEVELS = ("res2", "res3", "res4", "res5")  # strides 4, 8, 16, 32
VGG_LEVELS = ("conv3", "conv4", "conv5", "pool5")  # the same strides
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # by output stride, arXiv 1706.05587, 3.3


class StatedInput(nn.Module):
    """A module whose state dict has its stride position and input normalization, and checks them.

    No tensor's shape shows these, so a differently built model would load and compute something
    else without an error.
    """

    def state_input(self, network: StagedNetwork, normalization: dict[str, list[float]]) -> None:
        self._stated = {"stride_in_1x1": [float(bool(stride_of(network)))], **normalization}

    def get_extra_state(self) -> Tensor:
        return torch.tensor(sum(self._stated.values(), []))

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError: the state is of a model with another stride or normalization."""
        sizes = [len(values) for values in self._stated.values()]
        found, own = (one.cpu().split(sizes) for one in (state, self.get_extra_state()))
        other = [
            f"{key} {[round(x, 4) for x in theirs.tolist()]}, but this model "
            f"{[round(x, 4) for x in ours.tolist()]}"
            for key, theirs, ours in zip(self._stated, found, own, strict=True)
            if not torch.equal(theirs, ours)
        ]
        if other:
            raise ValueError(
                f"the state's backbone has {'; '.join(other)}: build the model as before, with the "
                "same weights and options"
            )


class PyramidBackbone(BackboneWithFPN, StatedInput):
    """torchvision's ``BackboneWithFPN`` that refuses states of another stride or input."""


def fpn_backbone(
    name: str,
    weights: str | os.PathLike | None = None,
    preprocessing: str | Preprocessing = "",
    *,
    out_features: Sequence[str] = (),
    out_channels: int = 256,
    extra_blocks: ExtraFPNBlock | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    **options,
) -> tuple[BackboneWithFPN, dict[str, list[float]]]:
    """Builds torchvision's feature pyramid on one of our networks, with its input normalization.

    ``backbone, norm = fpn_backbone(...)``, then ``FasterRCNN(backbone, num_classes, **norm)``; the
    same for ``RetinaNet`` and ``MaskRCNN``.

    Args:
        name: a ResNet, plain or VGG network of ``list_models()``.
        weights, preprocessing: see :func:`resnet_backbone.adapters.build_backbone`.
        out_features: stages that feed the pyramid, in any order; by default the ones at strides 4,
            8, 16, 32.
        out_channels: channels of every pyramid level.
        extra_blocks: torchvision's ``LastLevelMaxPool`` (the default) or ``LastLevelP6P7``.
        norm_layer: norm of the pyramid's convolutions; none by default.
        **options: arguments of the network. ``freeze_at`` is 2 with weights and 0 without
            (torchvision's ``trainable_layers`` is 5 - ``freeze_at``); ``norm`` is FrozenBN with
            weights that have batch norm.

    Returns:
        (backbone, {"image_mean": RGB in 0..1, "image_std"}). The backbone maps normalized images
        to an OrderedDict of maps "0", "1", ..., finest first, and the maps of ``extra_blocks``.

    Raises:
        WeightsError: see :func:`resnet_backbone.adapters.build_backbone`.
    """
    levels = tuple(out_features) or (VGG_LEVELS if name.startswith("vgg") else RESNET_LEVELS)
    network, found = build_backbone(name, weights, preprocessing, out_features=levels, **options)
    levels = [stage for stage in network.stage_names if stage in levels]  # the pyramid's order
    backbone = PyramidBackbone(
        network,
        return_layers={level: str(index) for index, level in enumerate(levels)},
        in_channels_list=[network.features[level].channels for level in levels],
        out_channels=out_channels,
        extra_blocks=extra_blocks,
        norm_layer=norm_layer,
    )
    normalization = image_normalization(found)
    backbone.state_input(network, normalization)
    return backbone, normalization


class NormalizedBackbone(StatedInput):
    """A backbone for DeepLabV3: RGB images in 0..1 -> {"out": res5, "aux": res4}.

    torchvision's segmentation models leave normalization to the caller. Here it is part of the
    model and of its state dict. A ValueError is raised if the first images have values outside of
    -0.5..1.5, as in normalized images or 0..255; some augmentations exceed 0..1 a little.
    """

    def __init__(self, network: StagedNetwork, preprocessing: Preprocessing):
        super().__init__()
        self.network, self.is_checked = network, False
        normalization = image_normalization(preprocessing)
        self.state_input(network, {})  # mean and std are buffers
        for name in ("mean", "std"):
            values = torch.tensor(normalization[f"image_{name}"])
            self.register_buffer(name, values[:, None, None])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if not (self.is_checked or torch.compiler.is_compiling()) and images.numel():
            low, high = images.aminmax()
            if low < -0.5 or high > 1.5:
                raise ValueError(
                    f"expected RGB images in 0..1, found values from {low:.3g} to {high:.3g}: "
                    "this model normalizes its input itself"
                )
            self.is_checked = bool(low < high)  # once, since a GPU has to wait for it
        maps = self.network((images - self.mean) / self.std)
        names = {"res5": "out", "res4": "aux"}
        return {names[stage]: x for stage, x in maps.items()}


def deeplabv3(
    name: str,
    num_classes: int,
    weights: str | os.PathLike | None = None,
    preprocessing: str | Preprocessing = "",
    *,
    output_stride: int = 16,
    aux_loss: bool = False,
    **options,
) -> DeepLabV3:
    """Builds torchvision's DeepLabV3 (arXiv 1706.05587) on one of our dilated ResNets.

    It takes RGB images in 0..1, (N, 3, H, W), and normalizes them itself. It returns {"out": logits
    (N, num_classes, H, W)} and, with ``aux_loss``, "aux", the logits of an FCN head on res4.

    Args:
        name, weights, preprocessing: see :func:`fpn_backbone`.
        output_stride: 16 or 8, with atrous rates (6, 12, 18) or (12, 24, 36).
        **options: arguments of the network, for example ``multi_grid=(1, 2, 4)``. By default
            batch norms train and nothing is frozen.

    Raises:
        ValueError: another output stride, or a network that cannot be dilated.
        WeightsError: see :func:`resnet_backbone.adapters.build_backbone`.
    """
    if output_stride not in ATROUS_RATES:
        raise ValueError(f"output_stride must be 16 or 8, not {output_stride}")
    if options.get("in_channels", 3) != 3:
        raise ValueError("deeplabv3 normalizes RGB images: in_channels must be 3")
    if not name.startswith(("resnet", "plain")):
        raise ValueError(f"DeepLabV3 needs a dilated ResNet, not {name!r}: use resnet50")
    options = dict(norm="BN", freeze_at=0) | options
    network, found = build_backbone(
        name,
        weights,
        preprocessing,
        dilations=DILATIONS[output_stride],
        out_features=("res4", "res5") if aux_loss else ("res5",),
        **options,
    )
    channels = network.features["res5"].channels
    return DeepLabV3(
        NormalizedBackbone(network, found),
        DeepLabHead(channels, num_classes, ATROUS_RATES[output_stride]),
        FCNHead(network.features["res4"].channels, num_classes) if aux_loss else None,
    )

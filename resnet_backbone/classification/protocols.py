"""The paper's test protocols, from an image to class probabilities.

A protocol defines the short sides to which images are resized and a crop in the loader's workers,
and turns images into class probabilities. The paper's per-pixel mean has the size of its training
crop. It is subtracted from images of exactly this size (center, ten_crop, CIFAR's full). At other
sizes (dense), ``InputNormalizer`` subtracts the channel means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.classification.data.augment import center_crop
from resnet_backbone.models import VGG, PReLUNet, StagedNetwork
from resnet_backbone.weights.preprocessing import InputNormalizer

Images = Tensor | Sequence[Tensor]  # uint8 (N, 3, H, W), or N of (3, H, W) if sizes differ
POOLINGS = ("sliding", "global_pool")
SOFTMAXES = ("per_position", "per_view", "at_end")


@dataclass(frozen=True)
class Member:
    """A network with its own preprocessing: uint8 RGB images -> logits."""

    model: nn.Module  # normalized (N, 3, H, W) -> logits (N, num_classes), of any library
    normalizer: InputNormalizer  # also defines the device
    autocast: torch.dtype | None = None  # torch.bfloat16 or torch.float16
    channels_last: bool = True  # memory format of the network's input

    def run(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Applies a function to the normalized images, under autocast if set."""
        inputs = self.normalizer(images)
        if not self.channels_last:
            inputs = inputs.contiguous()
        device = self.normalizer.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return function(inputs)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> logits, float64 (N, num_classes)."""
        logits = self.run(self.model, images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{type(self.model).__name__} returns {kind}, not logits (N, num_classes): "
                "evaluation needs a classifier, with its head (our networks: without out_features)"
            )
        return logits.double()

    def position_logits(self, images: Tensor, window: int) -> Tensor:
        """Applies the network convolutionally: float64 (N, num_classes, h, w)."""
        last = self.model.stage_names[-1]

        def apply(inputs: Tensor) -> Tensor:
            maps = self.model.forward_features(inputs, [last])[last]
            return _head_as_convolution(self.model, maps, window)

        return self.run(apply, images).double()


def _head_as_convolution(network: StagedNetwork, maps: Tensor, window: int) -> Tensor:
    """Applies the head at each position of a ``window`` that slides over the last stage's map."""
    height, width = maps.shape[-2:]
    if min(height, width) < window:
        raise ValueError(
            f"dense testing slides a {window}x{window} window, but the last map is "
            f"{height}x{width}: use larger sizes, a smaller window, or pooling global_pool"
        )
    if isinstance(network, VGG) and network.fc6.in_features != maps.shape[1] * window**2:
        raise ValueError(f"window {window}: a VGG's is 7, the map that its fc6 was trained on")
    if isinstance(network, VGG):  # fc6 was trained as a 7x7 window (arXiv 1409.1556, section 3.2)
        kernel = network.fc6.weight.unflatten(1, (maps.shape[1], window, window))
        x = F.relu(F.conv2d(maps, kernel, network.fc6.bias))
        x = F.relu(F.conv2d(x, network.fc7.weight[:, :, None, None], network.fc7.bias))
    else:
        x = F.avg_pool2d(maps, window, stride=1)
    return F.conv2d(x, network.linear.weight[:, :, None, None], network.linear.bias)


def by_size(function: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """Applies a function to stacks of equally sized images; (N, ...) in the original order."""
    if isinstance(images, Tensor):
        return function(images)
    groups: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        groups.setdefault(image.shape, []).append(place)
    parts = [function(torch.stack([images[i] for i in places])) for places in groups.values()]
    order = torch.tensor([place for places in groups.values() for place in places])
    joined = torch.cat(parts)
    return joined[order.argsort().to(joined.device)]


class Protocol:
    """Base class of the protocols, which are frozen dataclasses."""

    name: ClassVar[str]
    interpolation: ClassVar[str] = "bilinear"  # of the resize

    @property
    def short_sides(self) -> tuple[int | None, ...]:
        """The short sides in pixels at which ``score`` takes each image; ``None``: not resized."""
        return (None,)

    @property
    def loading(self) -> tuple[tuple[int | None, ...], Callable[[Tensor], Tensor], str]:
        """What ``EvaluationFiles`` needs: short sides, :meth:`prepare`, interpolation."""
        return self.short_sides, self.prepare, self.interpolation

    def prepare(self, image: Tensor) -> Tensor:
        """Crops a resized image, uint8 (3, H, W), in a loader's worker."""
        return image

    def score(self, member: Member, images: Sequence[Images]) -> Tensor:
        """Returns class probabilities, float64 (N, num_classes), of images at ``short_sides``.

        This base class has a single view, which :meth:`prepare` makes.
        """
        return by_size(lambda stack: member(self.prepare(stack)).softmax(1), images[0])

    def settings(self) -> dict:
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Full(Protocol):
    """The whole image, not resized: the paper's single view of CIFAR-10 (section 4.2)."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True)
class _Cropped(Protocol):
    """Square crops of the resized image.

    Args:
        resize: short side in pixels (the paper: 256), or ``None`` for no resizing.
        crop: side of the square in pixels.
        interpolation: of the resize, "bilinear" or "bicubic".
    """

    resize: int | None = 256
    crop: int = 224
    interpolation: str = "bilinear"

    def __post_init__(self):
        if self.crop < 1 or (self.resize is not None and self.resize < self.crop):
            raise ValueError(
                f"a crop of {self.crop} does not fit into a short side of {self.resize}"
            )

    @property
    def short_sides(self) -> tuple[int | None, ...]:
        return (self.resize,)


@dataclass(frozen=True)
class Center(_Cropped):
    """The center crop, 224 of short side 256: the released weights' "1-crop"."""

    name: ClassVar[str] = "center"

    def prepare(self, image: Tensor) -> Tensor:
        return center_crop(image, self.crop)


@dataclass(frozen=True)
class TenCrop(_Cropped):
    """Crops of four corners and the center, also mirrored (paper, Tables 2 and 3).

    The softmax scores are averaged, as in the released weights' README. Each of the ten views runs
    through the network as a batch of its own.
    """

    name: ClassVar[str] = "ten_crop"

    def score(self, member: Member, images: Sequence[Images]) -> Tensor:
        from torchvision.transforms.functional import ten_crop  # seconds

        crops = [ten_crop(image, self.crop) for image in images[0]]
        views = [torch.stack(view) for view in zip(*crops, strict=True)]
        return sum(member(view).softmax(1) for view in views) / len(views)


@dataclass(frozen=True)
class Dense(Protocol):
    """Multi-scale fully convolutional testing (paper, section 3.4 and Table 4).

    Scores are averaged over all positions of a view (a size, mirrored or not), then over the views.
    The arguments are what the paper leaves open. The defaults follow VGG's protocol (arXiv
    1409.1556, section 3.2), which the paper cites: the class score map is averaged over positions,
    then the "soft-max class posteriors" over the views of the image and its mirror image.

    Args:
        sizes: short sides in pixels.
        flip: add the mirrored images as views.
        pooling: "sliding" is the fully convolutional form, with one score for each position: 7x7
            average pooling with stride 1, and the fc layer as a 1x1 convolution (VGG: fc6 as a 7x7
            convolution). "global_pool" is the network's own forward pass at each size. For a linear
            head, mean logits differ only in the smaller weight of border cells when sliding.
        softmax: "per_view": logits averaged over positions, softmax, probabilities averaged over
            views; "per_position": softmax at every position first; "at_end": all logits averaged,
            one softmax.
        window: side of the last map at the training size: 7 for ImageNet networks at 224.
    """

    sizes: tuple[int, ...] = (224, 256, 384, 480, 640)
    flip: bool = True
    pooling: str = "sliding"
    softmax: str = "per_view"
    window: int = 7
    name: ClassVar[str] = "dense"

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.sizes or min(self.sizes) < 1 or self.window < 1:
            raise ValueError(f"dense sizes {self.sizes}, window {self.window}: give positive ones")
        for value, choices in ((self.pooling, POOLINGS), (self.softmax, SOFTMAXES)):
            if value not in choices:
                raise ValueError(f"dense testing has no option {value!r}: use {', '.join(choices)}")

    @property
    def short_sides(self) -> tuple[int | None, ...]:
        return self.sizes

    def score(self, member: Member, images: Sequence[Images]) -> Tensor:
        network = member.model
        ours = isinstance(network, StagedNetwork) and network.is_classifier
        sliding_works = ours and not isinstance(network, PReLUNet)  # it pools a pyramid
        if self.pooling == "sliding" and not sliding_works:
            raise ValueError(
                f"dense testing of {type(network).__name__} needs pooling global_pool: only "
                "this package's ResNets, VGGs and BN-Inception can run as convolutions"
            )
        views = []
        for scaled in images:
            views.append(by_size(lambda stack: self._view(member, stack), scaled))
            if self.flip:
                views.append(by_size(lambda stack: self._view(member, stack.flip(-1)), scaled))
        mean = sum(views) / len(views)
        return mean.softmax(1) if self.softmax == "at_end" else mean

    def _view(self, member: Member, images: Tensor) -> Tensor:
        """Returns the scores of one view: logits for "at_end", else probabilities."""
        if self.pooling == "global_pool":
            logits = member(images)[:, :, None, None]
        else:
            logits = member.position_logits(images, self.window)
        if self.softmax == "per_position":
            return logits.softmax(1).mean((2, 3))
        logits = logits.mean((2, 3))
        return logits.softmax(1) if self.softmax == "per_view" else logits


PROTOCOLS: dict[str, type[Protocol]] = {kind.name: kind for kind in (Full, Center, TenCrop, Dense)}

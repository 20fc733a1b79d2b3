"""From pixels to what a network was trained on: the one place where images are normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_backbone.weights.preprocessing import Preprocessing

RGB = ("R", "G", "B")


class InputNormalizer:
    """Turns RGB bytes into a network's input, on the device where the network runs.

    Colour noise, channel order, mean and standard deviation are one affine map per image and
    channel, so bytes travel to the device and only one pass is made over the floats.

    Args:
        preprocessing: what the weights expect. Its ``mean_image`` is subtracted from images of
            exactly that size (the paper's per-pixel mean), its channel means from all others.
        device: where images are normalised.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device | str = "cpu"):
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        self.order = [RGB.index(c) for c in preprocessing.channel_order]
        mean = torch.tensor(preprocessing.pixel_mean_255(), dtype=torch.float32)
        std = torch.tensor(preprocessing.pixel_std_255(), dtype=torch.float32)
        self.mean = mean.view(3, 1, 1).to(self.device)
        self.scale = (1 / std).view(3, 1, 1).to(self.device)
        image = preprocessing.mean_image
        if image is not None:
            image = image.float() * (255.0 / preprocessing.value_range)
        self.mean_image = None if image is None else image.to(self.device)

    def __call__(self, images: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalises a batch.

        Args:
            images: uint8 (N, 3, H, W), RGB.
            shift: float32 (N, 3), grey levels (0..255) added to the channels R, G, B of each
                image: the colour noise of training.

        Returns:
            float32 (N, 3, H, W) in the weights' channel order, channels_last.
        """
        images = images.to(self.device, non_blocking=True)
        mean = self.mean
        if self.mean_image is not None and self.mean_image.shape[1:] == images.shape[2:]:
            mean = self.mean_image
        if shift is not None:
            shift = shift.to(self.device, non_blocking=True)
            mean = mean - shift[:, self.order, None, None]
        if self.order != [0, 1, 2]:
            images = images[:, self.order]
        images = images.to(torch.float32, memory_format=torch.channels_last)
        if mean.shape[-2:] != (1, 1):
            return images.sub_(mean).mul_(self.scale)
        # Rows of whole pixels: three values that repeat, broadcast, are several times slower.
        count, _, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).view(count, height, width * 3)
        torch.addcmul(_row(-mean * self.scale, width), rows, _row(self.scale, width), out=rows)
        return images


def _row(values: Tensor, width: int) -> Tensor:
    """(..., 3, 1, 1) -> (..., 1, width * 3): the values of one row of pixels."""
    return values.reshape(-1, 1, 3).expand(-1, width, 3).reshape(-1, 1, width * 3)

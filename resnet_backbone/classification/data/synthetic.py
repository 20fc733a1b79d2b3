"""Images that cost nothing: what a training step takes when data takes no time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from resnet_backbone.classification.data.batch import Batch


class SyntheticSource:
    """One batch of random bytes, made on the device and given again and again.

    Args:
        batch_size: of this process.
        shape: (3, H, W).
        class_names: one per class.
        num_samples: how many images count as an epoch.
        device: where the batch lies.
        seed: of the bytes.
    """

    def __init__(
        self,
        batch_size: int,
        shape: tuple[int, int, int],
        class_names: Sequence[str],
        num_samples: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (batch_size, *shape), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, len(class_names), (batch_size,), generator=generator)
        images = images.to(device, memory_format=torch.channels_last)
        self.batch = Batch(images, labels.to(device))
        self.num_samples, self.class_names = num_samples, tuple(class_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def batches(self, first_iteration: int = 0) -> Iterator[Batch]:
        while True:
            yield self.batch

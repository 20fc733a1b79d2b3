"""Mixup and CutMix on whole batches, on the device where the network runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_backbone.classification.data.batch import DataError

MIXING = 4  # the first word of a seed, beside those in `stream`, `loader` and `mean`


class BatchMixer:
    """Mixes each batch by one of torchvision's ``MixUp`` and ``CutMix``, chosen at random.

    It comes after normalisation, as in torchvision's references. What it draws is a function of
    the seed and the iteration, so a resumed run mixes alike.

    Args:
        num_classes: of the soft labels.
        mixup, cutmix: the alpha of each (arXiv 1710.09412, 1905.04899); 0 leaves it out.
        seed: of the run; give each process its own, or they mix alike.
    """

    def __init__(self, num_classes: int, mixup: float = 0.2, cutmix: float = 1.0, seed: int = 0):
        from torchvision.transforms import v2

        if mixup < 0 or cutmix < 0 or not (mixup or cutmix):
            raise DataError(f"mixup and cutmix are alphas >= 0, one of them > 0: {mixup}, {cutmix}")
        self.num_classes, self.seed = num_classes, seed
        self._transforms = []
        if mixup:
            self._transforms.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            self._transforms.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(self, images: Tensor, labels: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Mixes a batch.

        Args:
            images: float (N, 3, H, W), normalised.
            labels: int64 (N,).
            iteration: counted from 0.

        Returns:
            (images of the same shape, soft labels float32 (N, num_classes)); a batch of one is
            returned unmixed.
        """
        if len(labels) < 2:
            return images, F.one_hot(labels, self.num_classes).float()
        seed = np.random.default_rng([self.seed, MIXING, iteration]).integers(2**63)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            chosen = int(torch.randint(len(self._transforms), ()))
            return self._transforms[chosen](images, labels)

"""torchvision's PIL transforms for the augmentation of the paper: what ours is measured against."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resnet_backbone.classification.data.augment import PaperAugmentation, color_shift
from resnet_backbone.classification.data.crops import EncodedImage, draw_crop, resize_crop
from resnet_backbone.classification.data.imagenet import list_images
from resnet_backbone.classification.data.stream import DataError, sample_rng
from resnet_backbone.weights import get_preprocessing
from resnet_backbone.weights.inputs import InputNormalizer

NORMALIZATION = "torchvision"


def load_images(folder: str | None, count: int, quality: int | None, seed: int = 0) -> list[bytes]:
    """JPEG files in memory.

    Args:
        folder: of images, spread evenly over its sorted names; None makes synthetic ones of
            500 x 375, noise smoothed to the file size of a photograph.
        quality: encodes the images anew at this JPEG quality; None leaves them as they are.

    Raises:
        DataError: a folder without images.
    """
    if folder is None:
        return [_synthetic_jpeg(seed + i, quality or 90) for i in range(count)]
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give one of JPEG files with --images")
    names = list_images(root)
    if not names:
        raise DataError(f"{root} holds no images; give a folder of JPEG files with --images")
    chosen = [names[i * len(names) // count] for i in range(min(count, len(names)))]
    files = [(root / name).read_bytes() for name in dict.fromkeys(chosen)]
    return files if quality is None else [_encode(_open(data), quality) for data in files]


def reference_sample(data: bytes, rng: np.random.Generator, color_noise: str) -> Tensor:
    """One image through torchvision's v1 transforms: normalised float32 (3, 224, 224)."""
    from torchvision import transforms
    from torchvision.transforms import functional as TF

    image = TF.resize(_open(data), int(rng.integers(256, 481)))
    top, left = (int(rng.integers(n - 224 + 1)) for n in (image.height, image.width))
    image = TF.crop(image, top, left, 224, 224)
    if rng.random() < 0.5:
        image = TF.hflip(image)
    tensor = transforms.ToTensor()(image)
    tensor = tensor + torch.from_numpy(color_shift(color_noise, rng) / 255)[:, None, None]
    p = get_preprocessing(NORMALIZATION)
    return TF.normalize(tensor, p.mean, p.std)


class LoaderMethods:
    """Ways to make batches of the same images, each a pass over all of them.

    Args:
        images: encoded files.
        batch_size: images that are stacked.
    """

    def __init__(self, images: Sequence[bytes], batch_size: int):
        self.images, self.batch_size = images, batch_size
        self.augment = PaperAugmentation()
        self.normalizer = InputNormalizer(get_preprocessing(NORMALIZATION))
        self.passes = 0

    def _batches(self):
        self.passes += 1
        for first in range(0, len(self.images), self.batch_size):
            part = self.images[first : first + self.batch_size]
            yield [(data, sample_rng(0, self.passes, first + i)) for i, data in enumerate(part)]

    def reference(self) -> int:
        """To a normalised float batch, all by torchvision's transforms."""
        for part in self._batches():
            torch.stack([reference_sample(d, r, self.augment.color_noise) for d, r in part])
        return len(self.images)

    def ours(self, normalize: bool = False, partial: bool = True) -> int:
        """To a batch of bytes and colour shifts, as it goes to the device; or normalised too."""
        for part in self._batches():
            made = [self.augment(EncodedImage(d, partial=partial), r) for d, r in part]
            images = torch.stack([m.image for m in made])
            shift = torch.from_numpy(np.stack([m.shift for m in made]))
            if normalize:
                self.normalizer(images, shift)
        return len(self.images)

    def normalized(self) -> int:
        return self.ours(normalize=True)

    def whole(self) -> int:
        return self.ours(partial=False)


def geometry_difference(images: Sequence[bytes]) -> dict[str, float]:
    """How far our crops are from Pillow's resize of the same boxes, in grey levels of 255.

    Returns:
        "mean" and "max" absolute difference, "images".
    """
    means, largest = [], 0
    for index, data in enumerate(images):
        image = EncodedImage(data)
        crop = draw_crop(image.height, image.width, sample_rng(0, 0, index))
        left, top, right, bottom = crop.box(224)
        box = (left, top, min(right, image.width), min(bottom, image.height))
        theirs = _open(data).resize((224, 224), Image.Resampling.BILINEAR, box=box)
        ours = resize_crop(image, crop).permute(1, 2, 0).numpy()
        difference = np.abs(ours.astype(np.int16) - np.asarray(theirs))
        means.append(difference.mean())
        largest = max(largest, int(difference.max()))
    return {"mean": float(np.mean(means)), "max": largest, "images": len(images)}


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _encode(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _synthetic_jpeg(seed: int, quality: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.zeros((375, 500, 3))
    for cells, strength in ((6, 90), (40, 40), (160, 30)):  # large shapes, edges, texture
        coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        layer = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, dtype=np.float64) - 128) * (strength / 128)
    return _encode(Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)), quality)

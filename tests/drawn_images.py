"""Smooth random images, which a JPEG keeps, as arrays and as files."""

import io

import numpy as np
from PIL import Image


def picture(height=48, width=64, mode="RGB", seed=0, coarse=12) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind="JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def fill(folder, classes=("n01", "n02"), count=7, size=(52, 44), suffix=".JPEG"):
    """Writes ``folder/<class>/<number>.JPEG``, each another picture; returns the folder."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(*size[::-1], seed=100 * number + i).save(folder / name / f"{i}{suffix}")
    return folder

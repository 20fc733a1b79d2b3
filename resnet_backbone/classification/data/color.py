"""AlexNet's colour noise: one shift of R, G and B for a whole image, along its principal axes."""

from __future__ import annotations

import numpy as np

from resnet_backbone.classification.data.batch import DataError

NOISE_STRENGTH = 0.1  # standard deviation of each component's factor (AlexNet, section 4.1)

# Principal axes of ImageNet's RGB values, one a column; rows R, G, B (fb.resnet.torch,
# datasets/imagenet.lua).
AXES = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)

# By what the factor is multiplied, in grey levels of 0..255. AlexNet's text says eigenvalues; the
# published programs differ by a square root.
SCALINGS: dict[str, tuple[float, float, float]] = {
    # standard deviations along the axes (cuda-convnet2, AlexNet's own program): noise of 12.2,
    # 3.7 and 2.0 grey levels
    "cuda_convnet": (121.78, 37.09, 19.72),
    # eigenvalues of the covariance of values in 0..1 (fb.resnet.torch): 5.5, 0.48 and 0.11
    "fb_resnet_torch": (0.2175 * 255, 0.0188 * 255, 0.0045 * 255),
}
COLOUR_NOISES = (*SCALINGS, "none")


def check_colour_noise(name: str) -> None:
    """DataError for an unknown name."""
    if name not in COLOUR_NOISES:
        raise DataError(f"colour noise is one of {', '.join(COLOUR_NOISES)}, not {name!r}")


def colour_shift(name: str, rng: np.random.Generator) -> np.ndarray:
    """The noise of one image: float32 (3,), grey levels to add to R, G, B.

    Args:
        name: "cuda_convnet" or "fb_resnet_torch", the two published scalings.
    """
    return (AXES @ (rng.normal(0.0, NOISE_STRENGTH, 3) * SCALINGS[name])).astype(np.float32)

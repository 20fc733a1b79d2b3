"""Built-in images: handwritten digits drawn on photographs, for detection and classification.

Nothing is downloaded. The digits are scikit-learn's ``load_digits`` (1,797 scans of 8x8 cells), and
the backgrounds are photographs in the scikit-image package. Train and test share neither a digit
nor a photograph.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import numpy as np
from PIL import Image, ImageFilter

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Only photographs in scikit-image's wheel, with the license that it states for each.
BACKGROUNDS = {
    "train": {
        "astronaut": "NASA, public domain",
        "brick": "CC0",
        "coffee": "Rachel Michetti, CC0",
        "coins": "Brooklyn Museum, no known copyright restrictions",
        "grass": "CC0",
        "hubble_deep_field": "NASA, public domain",
        "immunohistochemistry": "CMMI, no known copyright restrictions",
        "rocket": "SpaceX, public domain",
    },
    "test": {
        "camera": "Lav Varshney, CC0",
        "chelsea": "Stefan van der Walt, CC0",
        "gravel": "CC0",
        "retina": "Mikael Haggstrom, CC0",
    },
}
TEST_SHARE = 0.3  # the last 30 % of the digits; the scans are ordered by writer
DIGIT_PIXELS = (24, 72)  # height and width of the pasted 8x8 cell grid in detection scenes
CROP = 64  # side in pixels of a classification image: one digit with its surroundings
CROP_DIGIT_PIXELS = (36, 54)  # of the 8x8 cell grid in a classification image
OFF_CENTER = 6  # largest offset in pixels, in each direction
VISIBLE = 0.3  # ink at or above this strength counts as part of the digit


def _load(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = "pip install 'resnet_backbone[quickstart]'"
        raise ImportError(f"the built-in data need {error.name}: {fix}") from error


@cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return ink (1797, 8, 8) float32 in [0, 1] and labels (1797,)."""
    digits = _load("sklearn.datasets").load_digits()
    return digits.images.astype(np.float32) / 16, digits.target


@cache
def load_photograph(name: str) -> Image.Image:
    """Return a photograph of ``BACKGROUNDS``, RGB."""
    return Image.fromarray(getattr(_load("skimage.data"), name)()).convert("RGB")


def digit_indices(split: str) -> range:
    """Return the indices into ``load_digits`` that ``split`` ("train" or "test") may use."""
    total = len(load_scans()[1])
    first_test = round(total * (1 - TEST_SHARE))
    return range(first_test) if split == "train" else range(first_test, total)


def crop_photograph(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random, perhaps mirrored square of the photograph, resized to ``size`` pixels.

    Training photographs are also rotated by right angles and their color channels permuted, since
    a detector would memorize the few photographs.
    """
    photo = load_photograph(name)
    side = int(min(rng.uniform(1, 2) * size, *photo.size))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    square = photo.resize((size, size), Image.BICUBIC, (left, top, left + side, top + side))
    pixels = np.asarray(square)
    if name in BACKGROUNDS["train"]:
        pixels = np.rot90(pixels, rng.integers(4))[..., rng.permutation(3)]
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def render_ink(
    index: int, rng: np.random.Generator, pixels: tuple[int, int] = DIGIT_PIXELS
) -> np.ndarray:
    """Return a digit enlarged, rotated and sharpened: float32 alpha in [0, 1], cropped to its ink.

    ``pixels`` is the range of the log-uniform size of the scan's 8x8 cells; the ink is smaller.
    """
    low, high = pixels
    size = int(round(np.exp(rng.uniform(np.log(low), np.log(high)))))
    cells = np.pad(load_scans()[0][index], 2)  # room for the rotation
    large = Image.fromarray(cells).resize((size * 12 // 8,) * 2, Image.BICUBIC)
    turned = large.rotate(rng.uniform(-12, 12), Image.BICUBIC)
    ink = np.clip((np.asarray(turned) - 0.25) / 0.4, 0, 1)  # sharp edges, like a pen's
    x0, y0, x1, y1 = tight_box(ink)
    return ink[y0:y1, x0:x1]


def tight_box(ink: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box ``(x0, y0, x1, y1)`` of the visible ink; x1 and y1 are exclusive."""
    rows, columns = (np.flatnonzero((ink >= VISIBLE).any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _pick_color(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an RGB color, 0 to 255, lighter or darker than the patch by a random, legible step."""
    mean, spread = patch.mean(), patch.std()
    step = rng.uniform(80, 150) + 0.5 * spread
    roomy = [tone for tone in (mean - step, mean + step) if 0 <= tone <= 255]
    tone = rng.choice(roomy) if roomy else (0.0 if mean > 127 else 255.0)
    return np.clip(tone + rng.uniform(-45, 45, size=3), 0, 255)


def draw_ink(
    canvas: np.ndarray, ink: np.ndarray, left: int, top: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a digit with a black or white outline onto an image.

    Args:
        canvas: float (H, W, 3), 0 to 255; not modified.
        ink: alpha (h, w) that fits into the canvas at ``left``, ``top`` (pixels).

    Returns:
        The new canvas, and alpha over the whole canvas: float32 (H, W), 0 to 1.
    """
    place = slice(top, top + ink.shape[0]), slice(left, left + ink.shape[1])
    alpha = np.zeros(canvas.shape[:2], np.float32)
    alpha[place] = ink
    color = _pick_color(canvas[place], rng)
    contrast = 0.0 if color.mean() > 127 else 255.0
    width = ImageFilter.GaussianBlur(ink.shape[0] / 24)
    blurred = Image.fromarray((alpha * 255).astype(np.uint8)).filter(width)
    outline = np.clip(np.asarray(blurred) / 64, 0, 1)
    opacity = rng.uniform(0.85, 1.0)
    for strength, paint in ((outline, contrast), (alpha, color)):
        blend = (strength * opacity)[..., None]
        canvas = canvas * (1 - blend) + paint * blend
    return canvas, alpha


def draw_digit_crop(split: str, number: int, index: int) -> np.ndarray:
    """Draw classification image ``number`` of a split, uint8 (64, 64, 3) RGB.

    Scale, scans and photographs match the detection scenes, so that it can serve pre-training.
    """
    rng = np.random.default_rng([list(BACKGROUNDS).index(split), number])
    photograph = crop_photograph(str(rng.choice(sorted(BACKGROUNDS[split]))), CROP, rng)
    ink = render_ink(index, rng, CROP_DIGIT_PIXELS)
    top, left = (_place(extent, rng) for extent in ink.shape)
    canvas, _ = draw_ink(photograph.astype(np.float32), ink, left, top, rng)
    return canvas.round().astype(np.uint8)


def _place(extent: int, rng: np.random.Generator) -> int:
    """Return the start of ink of some height or width: near the middle and inside the crop."""
    middle = (CROP - extent) // 2
    off = min(OFF_CENTER, middle)
    return middle + int(rng.integers(-off, off + 1))

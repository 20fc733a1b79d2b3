"""CIFAR-10 as it is published: the binary version and the Python version."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnet_backbone.classification.data.batch import DataError

CLASS_NAMES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # one label byte, then the R, G and B planes
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILES = ("test_batch",)
HELD_OUT = 5000  # the paper's validation images (section 4.2): here the last of the 50,000


def read_cifar10(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Reads the training or the test set.

    Args:
        root: a folder with the files of the binary version (``data_batch_1.bin`` ...) or of the
            Python version (``data_batch_1`` ...), or one that holds such a folder under its
            official name.

    Returns:
        (images, uint8 (N, 3, 32, 32), RGB; labels, int64 (N,)), in the official order.

    Raises:
        DataError: a missing, short or damaged file.
    """
    folder, suffix = _find(Path(root))
    read = _read_binary if suffix else _read_python
    parts = [read(folder / f"{name}{suffix}") for name in (TRAIN_FILES if train else TEST_FILES)]
    images = torch.from_numpy(np.concatenate([images for images, _ in parts]))
    labels = torch.from_numpy(np.concatenate([labels for _, labels in parts]))
    return images, labels


def _find(root: Path) -> tuple[Path, str]:
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py"):
        for suffix in (".bin", ""):
            if (folder / f"{TRAIN_FILES[0]}{suffix}").is_file():
                return folder, suffix
    raise DataError(
        f"{root}: no CIFAR-10 here; data.root is the folder that holds data_batch_1.bin (binary "
        "version) or data_batch_1 (Python version) and the other files"
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); fetch CIFAR-10 again"
        ) from error


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = _read_bytes(path)
    if not raw or len(raw) % RECORD:
        raise DataError(f"{path}: {len(raw)} bytes are no whole records; fetch CIFAR-10 again")
    records = np.frombuffer(raw, np.uint8).reshape(-1, RECORD)
    return _checked(path, records[:, 1:], records[:, 0])


class _Unpickler(pickle.Unpickler):
    """Arrays, bytes and lists only: nothing in the file is run."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    _read_bytes(path)
    try:
        with path.open("rb") as file:
            table = _Unpickler(file, encoding="bytes").load()
        return _checked(path, np.asarray(table[b"data"]), np.asarray(table[b"labels"]))
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a file of CIFAR-10's Python version ({error}); fetch it again"
        ) from error


def _checked(path: Path, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), RECORD - 1):
        raise DataError(f"{path}: {pixels.dtype} {pixels.shape} are not CIFAR-10's images")
    if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
        raise DataError(f"{path}: labels reach {labels.max()}; is it CIFAR-100? Give CIFAR-10")
    return pixels.reshape(-1, *SHAPE), labels.astype(np.int64)

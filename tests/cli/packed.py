"""Pictures and archives, in memory and as files."""

import io
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from drawn_images import encoded
from PIL import Image


def noise_jpeg(seed: int, height: int, width: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


jpeg = partial(noise_jpeg, height=40, width=60)


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.write_bytes(tar_of(files, mode))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tree_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

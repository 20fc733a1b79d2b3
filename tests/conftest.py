"""Fixtures for all tests."""

import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from drawn_images import voc_xml
from PIL import Image

PROJECT = Path(__file__).resolve().parents[1]


def pytest_report_header() -> str:
    is_there = find_spec("detectron2") is not None
    return "detectron2: " + ("found" if is_there else "not installed, tests/detection is left out")


@pytest.fixture(autouse=True)
def no_open_logs():
    """Takes away the log handlers that a test opened: pytest closes the streams that they have."""
    yield
    for name in ("detectron2", "fvcore", "resnet_backbone"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    if "detectron2.utils.logger" in sys.modules:
        sys.modules["detectron2.utils.logger"].setup_logger.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Checks of data that tests keep do not lie among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_BACKBONE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real data, `$RESNET_BACKBONE_DATA` or ../shared/data; skips where there is none.

    Mark tests that use it with `@pytest.mark.data`.
    """
    root = Path(os.environ.get("RESNET_BACKBONE_DATA", PROJECT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set RESNET_BACKBONE_DATA to where it is")
    return root


@pytest.fixture
def detectron2():
    """Skips a test where Detectron2 is not installed."""
    return pytest.importorskip("detectron2")


@pytest.fixture
def run_command(capsys):
    """Function (main of a command, arguments) -> (exit status, what it printed, its errors)."""

    def call(main, *arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments]) or 0
        except SystemExit as stopped:
            status = stopped.code
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def printed(run_command):
    """Function (main of a command, arguments) -> what it printed, with status 0."""

    def call(main, *arguments) -> str:
        status, out, error = run_command(main, *arguments)
        assert status == 0, error
        return out

    return call


@pytest.fixture
def refusal(run_command):
    """Function (main of a command, arguments) -> its error of one line, with status 2."""

    def call(main, *arguments) -> str:
        status, _, error = run_command(main, *arguments)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return call


@pytest.fixture
def make_voc(tmp_path):
    """Function that writes a small VOC folder and returns its path.

    Call it with {image id: objects as in `voc_xml`}; every image is 20 wide and 10 high.
    """

    def make(images, folder="set", split="train", suffix=".jpg", size=(20, 10)) -> Path:
        root = tmp_path / folder
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for image_id, objects in images.items():
            pixels = np.zeros((10, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{image_id}{suffix}")
            text = voc_xml(f"{image_id}{suffix}", size, objects)
            (root / "Annotations" / f"{image_id}.xml").write_text(text)
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(images) + "\n")
        return root

    return make


@pytest.fixture(scope="session")
def tiny_cifar10(tmp_path_factory) -> Path:
    """CIFAR-10's binary version with 40 generated images a file: noise tinted by the class."""
    folder = tmp_path_factory.mktemp("cifar10")
    rng = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for name in names:
        labels = rng.integers(0, 10, 40).astype(np.uint8)
        tints = np.stack([labels * 25, 255 - labels * 25, (labels % 3) * 100], axis=1)
        pixels = rng.integers(-40, 40, (40, 3, 1024)) + tints[:, :, None]
        pixels = pixels.clip(0, 255).astype(np.uint8).reshape(40, -1)
        records = np.concatenate([labels[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder

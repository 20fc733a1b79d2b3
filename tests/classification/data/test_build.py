"""The input that is computed from a training set: of that set alone, by all processes together."""

import numpy as np
import pytest
import torch
from drawn_images import fill
from PIL import Image

from resnet_backbone.classification.config import load_config
from resnet_backbone.classification.data import build
from resnet_backbone.classification.data.imagenet import read_image_folder
from resnet_backbone.classification.data.loader import BadImageReport
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import read_rgb

OPTIONS = ["data.crop=16", "data.short_side=[18,20]", "data.mean=pixel", "data.workers=0"]
OPTIONS += ["train.batch_size=4", "evaluation.crop=16", "evaluation.short_side=18"]


@pytest.fixture
def make_set(tmp_path):
    """Function: name, brightness -> a data set of two classes with four images each."""

    def make(name, bright=0):
        for split in ("train", "val"):
            for path in fill(tmp_path / name / split, count=4, suffix=".png").glob("*/*.png"):
                Image.open(path).point(lambda level: bright + level // 4).save(path)
        return tmp_path / name

    return make


def mean_of(root, run, world=None):
    run.mkdir(exist_ok=True)
    found = build.build_data(load_config([], [f"data.root={root}", *OPTIONS]), run, world)
    return found.preprocessing


def test_a_single_class_is_refused(tmp_path):
    """As where an archive was unpacked into a folder of its own name."""
    fill(tmp_path / "set" / "train" / "train", count=2)
    with pytest.raises(DataError, match="set has a single class, train: data.root is the folder"):
        mean_of(tmp_path / "set", tmp_path / "run")


def test_the_mean_is_kept_with_the_run(make_set, tmp_path, monkeypatch):
    root, run = make_set("set"), tmp_path / "run"
    first = mean_of(root, run)
    assert [p.name for p in run.iterdir()] == [build.INPUT_FILE]
    monkeypatch.setattr(build, "compute_mean", None)  # not called again
    again = mean_of(root, run)
    assert torch.equal(again.mean_image, first.mean_image) and again == first
    (run / build.INPUT_FILE).write_bytes(b"nothing")
    with pytest.raises(DataError, match=f"{build.INPUT_FILE} cannot be read .*; remove it"):
        mean_of(root, run)


def test_the_kept_mean_is_not_of_another_data_set(make_set, tmp_path):
    """Of the same size, in the folder of a run that died before its first checkpoint."""
    dark, light, run = make_set("dark", 20), make_set("light", 180), tmp_path / "run"
    mean_of(dark, run)
    found = mean_of(light, run)
    assert torch.equal(found.mean_image, mean_of(light, tmp_path / "fresh").mean_image)
    assert found.mean_image.min() > 180


def mean_on_each(world, root, run):
    found = mean_of(root, run, world)
    return found, found.mean_image


def test_processes_share_the_work_and_get_the_mean_of_one(make_set, tmp_path, two_processes):
    root, run = make_set("set"), tmp_path / "run"
    alone = mean_of(root, tmp_path / "alone")
    for found, image in two_processes(mean_on_each, root, run):
        assert found == alone and torch.equal(image, alone.mean_image)


def test_statistics_against_numpy():
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    values = images.numpy().astype(np.float64)
    found = build.image_statistics(images.split(5), (3, 32, 32))
    np.testing.assert_allclose(found.image, values.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.channels, values.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(found.std, values.std((0, 2, 3)), rtol=1e-9)


SIZES = {"size": 16, "short_side": 44}  # the images' own short side: nothing is resized


def test_mean_image(tmp_path):
    dataset = read_image_folder(fill(tmp_path))
    crops = [read_rgb(path)[14:30, 18:34].transpose(2, 0, 1) for path, _ in dataset.samples]
    expected = np.mean(crops, axis=0, dtype=np.float64)
    for workers in (0, 1):
        mean = build.compute_mean(dataset, num_images=99, workers=workers, **SIZES)
        np.testing.assert_allclose(mean.image, expected, rtol=1e-6)
        np.testing.assert_allclose(mean.channels, expected.mean((1, 2)), rtol=1e-6)
        assert mean.num_images == 14 and mean.image.dtype == torch.float32


def test_mean_of_a_subset_leaves_out_and_counts_bad_images(tmp_path):
    dataset = read_image_folder(fill(tmp_path))
    first, again, whole = (build.compute_mean(dataset, num_images=n, **SIZES) for n in (9, 9, 14))
    assert (first.num_images, whole.num_images) == (9, 14)
    assert torch.equal(first.image, again.image) and not torch.equal(first.image, whole.image)
    report = BadImageReport()
    for path, _ in dataset.samples[:7]:
        path.write_bytes(b"")
    assert build.compute_mean(dataset, num_images=14, report=report, **SIZES).num_images == 7
    assert report.num_bad == 7
    for path, _ in dataset.samples:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="has no mean"):
        build.compute_mean(dataset, num_images=14, **SIZES)

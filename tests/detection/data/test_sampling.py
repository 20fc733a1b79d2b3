"""Which images make up which iteration, on any number of processes and from any iteration on."""

import random
from itertools import chain, islice

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.build import _train_loader_from_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.data import sampling, scan_voc
from resnet_backbone.detection.data.mapper import AugmentedImages, TolerantMapper
from resnet_backbone.detection.data.sampling import BatchPlan, ImageStream, TrainingLoader

WIDE = [number % 3 != 0 for number in range(50)]


def parts(count, plan, start=0, size=20, wide=None, factors=None):
    """`count` parts of a process, from iteration `start` on."""
    stream = ImageStream(5, np.arange(size), factors)
    loader = TrainingLoader(None, stream, plan, wide)
    return list(islice(loader.samples(start), count))


few = st.integers(1, 3)


@settings(deadline=None)
@given(few, few, few, st.integers(0, 9), st.booleans())
def test_parts(accumulate, processes, part, start, grouped):
    wide = WIDE if grouped else None
    batch, count = part * accumulate * processes, 12 * accumulate
    of_rank = []
    for rank in range(processes):
        plan = BatchPlan(batch, accumulate, processes, rank)
        whole = parts(count + start * accumulate, plan, wide=wide)
        assert parts(count, plan, start, wide=wide) == whole[start * accumulate :]  # goes on
        assert {len(one) for one in whole} == {part}
        if grouped:
            assert all(len({WIDE[index] for _, index in one}) == 1 for one in whole)
        of_rank.append(whole)
    places = [place for whole in of_rank for one in whole for place, _ in one]
    assert len(places) == len(set(places))  # no image of an epoch twice
    # one process with as many parts takes the same ones, in the same order
    alone = parts(len(of_rank[0]) * processes, BatchPlan(batch, accumulate * processes), wide=wide)
    rounds = range(0, len(of_rank[0]), accumulate)
    dealt = [whole[first : first + accumulate] for first in rounds for whole in of_rank]
    assert list(chain.from_iterable(dealt)) == alone


def test_epochs_are_permutations():
    samples = [one[0] for one in parts(60, BatchPlan(1))]
    assert [place for place, _ in samples] == list(range(60))
    epochs = [[index for _, index in samples[first : first + 20]] for first in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_repeat_factors_on_average():
    factors = np.array([0.25, 1.0, 2.5])
    stream = ImageStream(1, np.arange(3), factors)
    counts = np.bincount(np.concatenate([stream.epoch(number) for number in range(4000)]))
    assert np.allclose(counts / 4000, factors, atol=0.03)


@pytest.mark.parametrize(
    "values, message",
    [
        ((6, 2, 2), "6 cannot be divided into 2 processes x 2 parts .*: choose a multiple of 4"),
        ((3, 2, 1), "3 cannot be divided into 1 process x 2 parts"),
        ((4, 0, 1), "ACCUMULATE 0: give at least 1"),
    ],
)
def test_batches_that_cannot_be_divided(values, message):
    with pytest.raises(UsageError, match=message):
        BatchPlan(*values)


def draw(image):
    """A mapper that draws from every generator that Detectron2's augmentations use."""
    if image == "broken":
        return None
    return image, random.random(), np.random.rand(), torch.rand(1).item()


def test_augmentation_is_a_function_of_the_place():
    images = AugmentedImages([f"{number}" for number in range(20)], draw, seed=5)
    found = {}
    for workers in (0, 2):
        plan = BatchPlan(4, 2)
        loader = TrainingLoader(images, ImageStream(5, np.arange(20)), plan, None, workers)
        torch.rand(workers + 1), np.random.rand(workers + 1)  # what was drawn before is no matter
        found[workers] = list(islice(loader.start(0), 12))
        later = list(islice(loader.start(4), 4))
        assert later == found[workers][8:]
    assert found[0] == found[2]
    drawn = {sample[1:] for part in found[0] for sample in part}
    assert len(drawn) == 24  # also for an image that comes again in the next epoch


def test_unreadable_images_are_replaced_by_the_same_ones():
    images = ["broken", "a", "b", "broken", "c"]
    data = AugmentedImages(images, draw, seed=0)
    first = [data[place, 0] for place in range(30)]
    assert first == [data[place, 0] for place in range(30)]
    assert {found[0] for found in first} == {"a", "b", "c"}
    with pytest.raises(OSError, match="in a row cannot be used"):
        AugmentedImages(["broken"] * 3, draw, seed=0)[0, 0]


@pytest.fixture
def two_sets():
    """Two data sets with a common and a rare class, and images without boxes."""
    size, names = {"width": 4, "height": 3}, ("sampling_a", "sampling_b")
    for name, count in zip(names, (6, 3), strict=True):
        boxes = [[{"category_id": int(i == 0), "iscrowd": 0}] for i in range(count)]
        images = [{"file_name": name, "annotations": found, **size} for found in (*boxes, [])]
        DatasetCatalog.register(name, lambda images=images: images)
    return names


@pytest.mark.parametrize(
    "sampler", ["RepeatFactor", "Weighted", "WeightedCategory", "RandomSubset", ""]
)
def test_detectron2s_samplers(make_cfg, two_sets, sampler, caplog):
    keys = dict(DATASETS__TRAIN=two_sets, DATALOADER__SAMPLER_TRAIN=f"{sampler}TrainingSampler")
    cfg = make_cfg(DATALOADER__REPEAT_THRESHOLD=0.9, **keys)
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("sampling_b", 2.5)]
    caplog.set_level("INFO")
    loader = sampling.build_loader(cfg, draw, seed=1)
    assert len(loader.dataset) == 9  # those without boxes are left out
    assert "sampling_b: 1 of 4 images have nothing to learn from" in caplog.text
    theirs = _train_loader_from_config(cfg, mapper=draw)["sampler"]
    if hasattr(theirs, "_int_part"):
        wanted = (theirs._int_part + theirs._frac_part).double().numpy()
        assert np.allclose(loader.stream.factors, wanted, rtol=1e-6)
        assert loader.stream.factors.max() > 1.2
    else:
        assert loader.stream.factors is None
        assert len(set(loader.stream.epoch(0))) == (4 if sampler == "RandomSubset" else 9)


def test_refused_samplers(make_cfg, two_sets):
    cfg = make_cfg(DATASETS__TRAIN=two_sets, DATALOADER__SAMPLER_TRAIN="Other")
    with pytest.raises(UsageError, match="SAMPLER_TRAIN 'Other': choose TrainingSampler, "):
        sampling.build_loader(cfg, draw, seed=1)
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("sampling_b", 0.0)]
    with pytest.raises(UsageError, match="factors must be above 0"):
        sampling.build_loader(cfg, draw, seed=1)


def test_proposals_that_are_not_named(make_cfg, two_sets):
    cfg = make_cfg(DATASETS__TRAIN=two_sets, MODEL__LOAD_PROPOSALS=True)
    with pytest.raises(UsageError, match="PROPOSAL_FILES_TRAIN has no file for sampling_a"):
        sampling.build_loader(cfg, draw, seed=1)


def test_workers_and_cores(make_cfg, monkeypatch):
    monkeypatch.setattr(sampling, "available_cores", lambda: 3)
    for workers, wanted in ((4, 3), (2, 2), (0, 0)):
        cfg = make_cfg(DATALOADER__NUM_WORKERS=workers)
        sampling.limit_workers(cfg)
        assert cfg.DATALOADER.NUM_WORKERS == wanted


def test_an_image_that_breaks_during_training_is_left_out(make_cfg, tiny_voc):
    """The loader takes another one in its place; evaluation ends."""
    file = sorted((tiny_voc / "JPEGImages").iterdir())[0]
    good = {"file_name": str(file), "image_id": "good", "annotations": []}
    broken = {**good, "file_name": str(file.with_name("gone.jpg"))}
    mapper = TolerantMapper(make_cfg(), True)
    assert mapper(dict(good))["image_id"] == "good"
    assert mapper(dict(broken)) is None
    with pytest.raises(OSError, match="gone.jpg"):
        TolerantMapper(make_cfg(), False)(dict(broken))


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L"])
def test_the_mapper_gives_what_detectron2s_gives(make_cfg, tiny_voc, image_format):
    cfg = make_cfg("voc/faster_rcnn_R_50_FPN.yaml", INPUT__FORMAT=image_format)
    for record in scan_voc(tiny_voc, "train", ["bar", "box"])[0]:
        found = []
        for kind in (TolerantMapper, DatasetMapper):
            np.random.seed(3)
            found.append(kind(cfg, True)(record))
        ours, theirs = found
        assert ours.keys() == theirs.keys() and torch.equal(ours["image"], theirs["image"])
        boxes = [one["instances"].gt_boxes.tensor for one in found]
        assert torch.equal(*boxes) and len(boxes[0])


def test_the_mapper_sees_gray_levels_of_16_bits(make_cfg, tmp_path):
    levels = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    record = {"file_name": str(tmp_path / "x.png"), "height": 40, "width": 60}
    cfg = make_cfg("voc/faster_rcnn_R_50_FPN.yaml", INPUT__MIN_SIZE_TEST=40)
    image = TolerantMapper(cfg, False)(record)["image"]
    assert torch.equal(image, torch.from_numpy((levels >> 8).astype(np.uint8)).expand(3, -1, -1))

"""Batches do not depend on workers or on where a run starts; bad images; signals."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import fill
from PIL import Image

from resnet_backbone.classification.data import loader
from resnet_backbone.classification.data.augment import InceptionAugmentation, PaperAugmentation
from resnet_backbone.classification.data.imagenet import ImageFiles, read_image_folder
from resnet_backbone.classification.data.loader import BadImageReport, ImageNote, LoaderSource
from resnet_backbone.classification.data.sources import Batch, SampleStream, sample_rng
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import EncodedImage

CLASSES = ("n01", "n02", "n03")
AUGMENT = PaperAugmentation(size=16, short_side=(18, 40))
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path, CLASSES)


@pytest.fixture
def dataset(root) -> ImageFiles:
    return read_image_folder(root)


def batches(dataset, first=0, count=4, *, augment=AUGMENT, seed=5, **options):
    source = LoaderSource(dataset, SampleStream(len(dataset), 6, seed), augment, **options)
    with closing(source.batches(first)) as made:
        return list(islice(made, count))


def assert_same(ours: list[Batch], theirs: list[Batch]):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert (a.shift is None) == (b.shift is None)
        assert a.shift is None or torch.equal(a.shift, b.shift)


def test_a_batch_is_what_its_functions_say(dataset):
    batch = batches(dataset)[2]
    indices, epochs = SampleStream(21, 6, 5).batch(2)
    assert batch.labels.tolist() == [dataset.labels[i] for i in indices]
    for place, (index, epoch) in enumerate(zip(indices, epochs, strict=True)):
        data = EncodedImage(dataset[int(index)].data)
        expected = AUGMENT(data, sample_rng(5, int(epoch), int(index)))
        assert torch.equal(batch.images[place], expected.image)
        np.testing.assert_array_equal(batch.shift[place], expected.shift)
    assert batch.images.shape == (6, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.shift.dtype == torch.float32 and batch.labels.dtype == torch.int64


@pytest.mark.parametrize(
    "augment", [AUGMENT, InceptionAugmentation(size=16, randaugment=9)], ids=["paper", "modern"]
)
def test_any_number_of_workers_and_any_start_give_the_same_batches(dataset, augment):
    whole = batches(dataset, 0, 6, augment=augment)
    torch.manual_seed(1)  # a generator that the workers inherit
    assert_same(batches(dataset, 0, 6, workers=1, augment=augment), whole)
    assert_same(batches(dataset, 2, 4, workers=3, augment=augment), whole[2:])
    assert not torch.equal(whole[0].images, batches(dataset, seed=6, augment=augment)[0].images)


def test_bad_images_are_replaced_alike_and_reported(dataset, root, tmp_path):
    good = batches(dataset, 0, 7)
    (root / "n02" / "3.JPEG").write_bytes(b"")
    broken = dataset.samples.index((root / "n02" / "3.JPEG", 1))
    report = BadImageReport(tmp_path / "bad_images.txt", 1)
    found = batches(dataset, 0, 7, report=report)
    assert_same(batches(dataset, 0, 7, workers=2), found)
    assert report.path.read_text() == f"bad\t{root / 'n02' / '3.JPEG'}\tthe file is empty\n"
    places = np.concatenate([SampleStream(21, 6, 5).batch(i)[0] for i in range(7)])
    ours, theirs = (torch.cat([batch.images for batch in made]) for made in (found, good))
    assert (ours == theirs).flatten(1).all(1).tolist() == (places != broken).tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_went_away_is_one_line(dataset, root, workers):
    for path in root.glob("*/*.JPEG"):
        path.unlink()
    with pytest.raises(DataError, match="is the data still there") as caught:
        batches(dataset, workers=workers)
    assert "\n" not in str(caught.value)


def test_converted_images_are_used_and_reported(dataset, root, tmp_path):
    Image.open(root / "n01" / "0.JPEG").convert("CMYK").save(root / "n01" / "0.JPEG")
    report = BadImageReport(tmp_path / "r.txt", 0)
    batches(dataset, 0, 4, report=report)
    assert report.path.read_text() == f"converted\t{root / 'n01' / '0.JPEG'}\tCMYK\n"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_no_more_workers_than_cores(dataset, monkeypatch):
    monkeypatch.setattr(loader, "available_cores", lambda: 1)
    before = set(multiprocessing.active_children())
    made = LoaderSource(dataset, SampleStream(21, 6), AUGMENT, workers=3).batches(0)
    next(made)
    assert len(set(multiprocessing.active_children()) - before) == 1
    made.close()


def test_dropping_the_iterator_ends_the_workers_soon(dataset):
    before = set(children(os.getpid()))
    made = LoaderSource(dataset, SampleStream(21, 6), AUGMENT, workers=2).batches(0)
    next(made)
    workers = set(children(os.getpid())) - before
    assert len(workers) == 2
    start = time.monotonic()
    del made
    assert not any(map(alive, workers)) and time.monotonic() - start < 5


PROGRAM = """
import os, signal, sys
from resnet_backbone.classification.data.augment import PaperAugmentation
from resnet_backbone.classification.data.imagenet import read_image_folder
from resnet_backbone.classification.data.loader import LoaderSource
from resnet_backbone.classification.data.sources import SampleStream

stop = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda *_: stop.append(1))
dataset = read_image_folder(sys.argv[1])
augment = PaperAugmentation(size=16, short_side=(18, 40))
batches = LoaderSource(dataset, SampleStream(21, 6), augment, workers=2).batches(0)
next(batches)
print("ready", flush=True)
after = 0
for batch in batches:
    after += bool(stop)
    if after == 20:  # more than were made ahead: the workers are at work after the signal
        print("saved", flush=True)
        break
sys.exit(3)  # with the iterator alive
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Two running programs: to be interrupted and to be killed; importing torch takes seconds."""
    root = fill(tmp_path_factory.mktemp("images"), CLASSES)
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(root)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = pipes | {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "start_new_session": True}
    made = [subprocess.Popen(command, **options) for _ in range(2)]
    yield made
    for process in made:
        process.kill()
        process.wait()


def test_signals_to_the_group_leave_the_workers_to_the_main_process(programs):
    process = programs[0]
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert (output, process.returncode) == ("saved\n", 3), errors
    assert errors == ""


def test_workers_end_when_the_main_process_is_killed(programs):
    process = programs[1]
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def bad(path, reason="truncated"):
    return ImageNote(loader.BAD, path, reason)


def test_each_file_is_listed_once(tmp_path):
    report = BadImageReport(tmp_path / "run" / "bad_images.txt")
    report.add()
    assert not report.path.exists()
    report.add(bad("a"), bad("a"), ImageNote(loader.CONVERTED, "c", "CMYK"))
    report.add(bad("a", "another reason"), bad("b\tc", "two\nlines"))
    report.add(bad("b\tc"))
    assert report.path.read_text() == "bad\ta\ttruncated\nconverted\tc\tCMYK\nbad\tb c\ttwo lines\n"
    assert (report.num_bad, report.num_converted) == (2, 1)


def test_a_resumed_run_goes_on_with_the_report(tmp_path):
    path = tmp_path / "bad_images.txt"
    BadImageReport(path).add(bad("a"), bad("caf\udce9.jpg"))
    whole = path.read_bytes()
    path.write_bytes(whole + b"bad\tb\ttrun")  # the run died within a line
    resumed = BadImageReport(path)
    assert resumed.bad == {"a": "truncated", "caf\udce9.jpg": "truncated"}
    resumed.add(bad("a"), bad("c"))
    assert path.read_bytes() == whole + b"bad\tc\ttruncated\n"


def test_the_limit_stops_with_one_line(tmp_path):
    report = BadImageReport(tmp_path / "r.txt", 4)
    report.add(*(bad(str(i)) for i in range(4)))
    with pytest.raises(DataError) as caught:
        report.add(bad("the fifth"))
    message = str(caught.value)
    assert (
        "5 images cannot be read, but only 4 are allowed: 0 (truncated); 1 (truncated)" in message
    )
    assert "r.txt" in message and "data.max_bad_images" in message and "\n" not in message
    assert "the fifth" in report.path.read_text()
    with pytest.raises(DataError):
        BadImageReport(report.path, 4).add()
    with pytest.raises(DataError):
        BadImageReport(max_bad_images=0).add(bad("a"))
    BadImageReport().add(*(bad(str(i)) for i in range(500)))  # any number


def test_unusual_images_are_counted_beyond_the_list(tmp_path):
    report = BadImageReport(tmp_path / "r.txt", 0)
    for i in range(loader.MAX_CONVERTED + 50):
        report.add(ImageNote(loader.CONVERTED, f"c{i}", "CMYK"))
    assert report.num_converted == loader.MAX_CONVERTED + 50
    assert report.path.read_text().count("\n") == loader.MAX_CONVERTED == len(report._converted)


def _add_many(path, first):
    report = BadImageReport(path)
    for i in range(40):
        report.add(bad(f"image {(first + i) % 50}"))


def test_processes_share_a_report(tmp_path):
    path = tmp_path / "r.txt"
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.starmap(_add_many, [(path, 12 * i) for i in range(3)])
    lines = path.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 50

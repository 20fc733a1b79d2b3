"""The report of bad images: each once, for several processes, beyond the end of a run."""

import multiprocessing

import pytest

from resnet_backbone.classification.data.bad_images import (
    BAD,
    CONVERTED,
    MAX_CONVERTED,
    BadImageReport,
    ImageNote,
)
from resnet_backbone.runtime.errors import DataError


def bad(path, reason="truncated"):
    return ImageNote(BAD, path, reason)


def test_each_file_is_listed_once(tmp_path):
    report = BadImageReport(tmp_path / "run" / "bad_images.txt")
    report.add()
    assert not report.path.exists()
    report.add(bad("a"), bad("a"), ImageNote(CONVERTED, "c", "CMYK"))
    report.add(bad("a", "another reason"), bad("b\tc", "two\nlines"))
    assert report.path.read_text() == "bad\ta\ttruncated\nconverted\tc\tCMYK\nbad\tb c\ttwo lines\n"
    assert (report.num_bad, report.num_converted) == (2, 1)
    report.add(bad("b\tc"))
    assert report.num_bad == 2


def test_a_resumed_run_goes_on_with_the_report(tmp_path):
    path = tmp_path / "bad_images.txt"
    BadImageReport(path).add(bad("a"), bad("b"))
    resumed = BadImageReport(path)
    assert resumed.bad == {"a": "truncated", "b": "truncated"}
    resumed.add(bad("a"), bad("c"))
    assert path.read_text().count("\n") == 3


def test_a_half_written_line_is_mended(tmp_path):
    path = tmp_path / "bad_images.txt"
    path.write_text("bad\ta\ttruncated\nbad\tb\ttrun")
    report = BadImageReport(path)
    assert report.num_bad == 1
    report.add(bad("c"))
    assert path.read_text() == "bad\ta\ttruncated\nbad\tc\ttruncated\n"


def test_the_limit_stops_with_one_line(tmp_path):
    report = BadImageReport(tmp_path / "r.txt", 4, "data.max_bad_images")
    report.add(*(bad(str(i)) for i in range(4)))
    with pytest.raises(DataError) as caught:
        report.add(bad("the fifth"))
    message = str(caught.value)
    assert "5 images cannot be read, 4 are allowed: 0 (truncated); 1 (truncated)" in message
    assert "r.txt" in message and "data.max_bad_images" in message and "\n" not in message
    assert "the fifth" in report.path.read_text()
    with pytest.raises(DataError):
        BadImageReport(report.path, 4).check()


def test_zero_allows_none_and_none_allows_all():
    with pytest.raises(DataError):
        BadImageReport(max_bad_images=0).add(bad("a"))
    BadImageReport().add(*(bad(str(i)) for i in range(5000)))


def test_unusual_images_are_counted_beyond_the_list(tmp_path):
    report = BadImageReport(tmp_path / "r.txt", 0)
    for i in range(MAX_CONVERTED + 50):
        report.add(ImageNote(CONVERTED, f"c{i}", "CMYK"))
    assert report.num_converted == MAX_CONVERTED + 50
    assert report.path.read_text().count("\n") == MAX_CONVERTED


def _add_many(path, first):
    report = BadImageReport(path)
    for i in range(40):
        report.add(bad(f"image {(first + i) % 50}"))


def test_processes_share_a_report(tmp_path):
    path = tmp_path / "r.txt"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_add_many, args=(path, 12 * i)) for i in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    lines = path.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 50


def test_surrogates_in_names_survive(tmp_path):
    path = tmp_path / "r.txt"
    BadImageReport(path).add(bad("caf\udce9.jpg"))
    assert BadImageReport(path).bad == {"caf\udce9.jpg": "truncated"}

"""Fixtures of the tests of data sets."""

import pytest


@pytest.fixture(autouse=True)
def registered():
    """Data sets that a test registers are taken away after it."""
    data = pytest.importorskip("detectron2.data")
    before = set(data.DatasetCatalog.list())
    yield
    for name in set(data.DatasetCatalog.list()) - before:
        data.DatasetCatalog.remove(name)
        data.MetadataCatalog.pop(name, None)

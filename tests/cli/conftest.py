"""What the tests of several commands share."""

import hashlib

import pytest


@pytest.fixture
def declare(monkeypatch):
    """Function (path) that makes a file the official archive of its name, and returns its path."""
    from resnet_backbone.detection.data import archives

    monkeypatch.setattr(archives, "ARCHIVES", {})

    def declare(path):
        content = path.read_bytes()
        archives.ARCHIVES[path.name] = len(content), hashlib.sha256(content).hexdigest()
        return path

    return declare

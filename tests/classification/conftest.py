"""What the tests of several processes share."""

from joined import two_processes  # noqa: F401 - a fixture

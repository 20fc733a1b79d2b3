"""What the tests of several processes share."""

from functools import partial

import pytest
from joined import in_two_processes


@pytest.fixture
def two_processes(tmp_path):
    """Function: what ``function(world, *arguments)``, of a module, returns on each of two."""
    return partial(in_two_processes, tmp_path / "joined")

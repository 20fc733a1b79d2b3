"""What the tests of checkpoints share: detectors' states, and refusals that change nothing."""

from contextlib import contextmanager

import pytest
import torch

from resnet_backbone.weights import WeightsError


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_holds(part, tensors, prefix=""):
    """Every tensor of a module, but for counters, is the file's."""
    state = {k: v for k, v in part.state_dict().items() if not k.endswith("tracked")}
    assert state
    for key, value in state.items():
        assert torch.equal(value, tensors[prefix + key].to(value.dtype)), key


@contextmanager
def refused(model, message):
    """A WeightsError of one line, after which the model is what it was."""
    before = state_of(model)
    with pytest.raises(WeightsError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert_holds(model, before)

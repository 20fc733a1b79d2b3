"""What the parity tests share."""

import pytest
import torch
from torch import nn


@pytest.fixture
def tolerance():
    """Of the float64 comparisons."""
    return dict(rtol=1e-10, atol=1e-12)


@pytest.fixture
def randomise():
    """Gives a network without values (on meta) float64 ones, drawn from a fixed seed.

    Norms are not the identity, frozen ones included, so that a misplaced one shows.
    """

    def fill(network):
        torch.manual_seed(0)
        network = network.double().to_empty(device="cpu")
        for module in network.modules():
            if hasattr(module, "running_var"):
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                if getattr(module, "num_batches_tracked", None) is not None:
                    module.num_batches_tracked.zero_()
            if hasattr(module, "running_var") or isinstance(module, nn.GroupNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = (3 / module.weight[0].numel()) ** 0.5
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.2)
        return network

    return fill


@pytest.fixture
def adopt():
    """Loads a state dict strictly into a network on meta: weights shared, statistics copied."""

    def load(network, state):
        buffers = {name for name, _ in network.named_buffers()}
        state = {key: x.clone() if key in buffers else x for key, x in state.items()}
        network.load_state_dict(state, strict=True, assign=True)

    return load


@pytest.fixture
def assert_same_gradients():
    """Compares gradients by name, to 1e-10 of the largest of each parameter."""

    def check(expected, network):
        own = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        assert expected.keys() == own.keys()
        for name, gradient in own.items():
            largest = expected[name].abs().max()
            assert largest > 0, f"the test is blind to {name}"
            error = (gradient - expected[name]).abs().max() / largest
            assert error < 1e-10, f"{name}: relative error {error}"

    return check

"""What the parity tests share."""

import torch
from drawn_networks import randomize

TOLERANCE = dict(rtol=1e-10, atol=1e-12)  # of the float64 comparisons


def draw(network):
    """Gives a network without values (on meta) float64 ones, drawn from a fixed seed."""
    torch.manual_seed(0)
    return randomize(network.double().to_empty(device="cpu")).train()


def adopt(network, state):
    """Loads a state dict strictly into a network on meta: weights shared, statistics copied."""
    buffers = {name for name, _ in network.named_buffers()}
    state = {key: x.clone() if key in buffers else x for key, x in state.items()}
    network.load_state_dict(state, strict=True, assign=True)


def assert_same(theirs, ours, expected, found, renamed=dict, without=()):
    """Compares maps by name, gradients to 1e-10 of the largest of each, then statistics.

    ``renamed`` gives their keys our names; ``without`` are parameters that ours lack.
    """
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **TOLERANCE)
    weights = {name: torch.randn_like(value) for name, value in expected.items()}
    for maps in (expected, found):
        sum((maps[name] * weights[name]).sum() for name in weights).backward()
    known = {n: p.grad for n, p in theirs.named_parameters() if n not in without}
    known = renamed({name: grad for name, grad in known.items() if grad is not None})
    own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert known.keys() == own.keys()
    for name, gradient in own.items():
        largest = known[name].abs().max()
        assert largest > 0, f"the test is blind to {name}"
        error = (gradient - known[name]).abs().max() / largest
        assert error < 1e-10, f"{name}: relative error {error}"
    state = renamed(theirs.state_dict())
    for key, value in ours.named_buffers():
        torch.testing.assert_close(value, state[key], **TOLERANCE)

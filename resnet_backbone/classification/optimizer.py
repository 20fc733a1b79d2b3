"""SGD as the paper's Caffe ran it, on PyTorch's own implementation."""

from __future__ import annotations

import torch
from torch import nn


def build_sgd(
    model: nn.Module, momentum: float, weight_decay: float, decay_norm_and_bias: bool = True
) -> torch.optim.SGD:
    """SGD over a network's trainable parameters.

    Args:
        momentum, weight_decay: as in the paper, 0.9 and 1e-4.
        decay_norm_and_bias: False leaves parameters of fewer than two dimensions (biases, BN)
            undecayed.
    """
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            chosen = decayed if decay_norm_and_bias or parameter.ndim > 1 else plain
            chosen.append(parameter)
    groups = [{"params": decayed}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay)


class LearningRate:
    """Sets an optimizer's learning rate, keeping the chosen form of momentum.

    Caffe's update is v = m v + lr g, w -= v (the released models' README); PyTorch's is
    v = m v + g, w -= lr v. They are the same while the rate stands still. When it changes, the
    old steps in Caffe's v keep the rate they were made with; scaling PyTorch's v by old / new
    does exactly that.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, form: str = "caffe"):
        if form not in ("caffe", "pytorch"):
            raise ValueError(f"unknown momentum form {form!r}: use caffe or pytorch")
        self.optimizer, self.form = optimizer, form

    def set(self, rate: float) -> None:
        old = self.optimizer.param_groups[0]["lr"]
        if rate == old:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.form == "caffe" and old > 0 and rate > 0:
            states = self.optimizer.state.values()
            buffers = [state.get("momentum_buffer") for state in states]
            buffers = [buffer for buffer in buffers if buffer is not None]
            if buffers:
                torch._foreach_mul_(buffers, old / rate)

"""What evaluations of a network in training need: averaged weights, and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Returns a moving average of a model; call ``update_parameters(model)`` after each step.

    Update n (from 0) has the decay min(decay, (1 + n) / (10 + n)), so the first weights are soon
    forgotten; the first update copies. Buffers, such as batch-norm statistics, are averaged, too.
    Constants, such as frozen weights, stay bit-identical.

    Args:
        decay: above 0 and below 1, such as 0.9998.
    """

    def update(averages: list[Tensor], values: list[Tensor], count: Tensor) -> None:
        done = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(averages, values, count)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


@contextmanager
def evaluation_mode(*networks: nn.Module) -> Iterator[None]:
    """Sets networks to evaluation mode in the block, then restores each module's mode."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""True batch-norm statistics: mean and variance over the training set, computed after training.

The released weights' statistics are "strictly computed using average (not moving average) on a
sufficiently large training batch after the training procedure" (KaimingHe/deep-residual-networks,
README). The moving averages of training lag behind the weights and weigh the last batches most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.evaluation import evaluation_mode
from resnet_backbone.runtime.processes import World
from resnet_backbone.weights.preprocessing import InputNormalizer

LAYER_INPUTS = ("batch", "population")
ZERO = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each channel, in float64.

    They are added by the formula of Chan, Golub and LeVeque (1979), which avoids cancellation.
    """

    count: int = 0
    mean: Tensor = ZERO
    deviations: Tensor = ZERO

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Computes the moments of (N, C, ...), in fp32 within the batch (in fp64 if it is fp64)."""
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.float()
        others = [dim for dim in range(x.dim()) if dim != 1]
        mean = x.mean(others, keepdim=True)
        variance = (x - mean).square_().mean(others)  # four times as fast as var_mean
        count = x.numel() // x.shape[1]
        return cls(count, mean.flatten().double(), variance.double() * count)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = delta**2 * (self.count * other.count / count)
        return Moments(count, mean, self.deviations + other.deviations + between)

    @property
    def variance(self) -> Tensor:
        """Population variance (divided by the count)."""
        return self.deviations / self.count


class BatchNormReport(NamedTuple):
    layers: tuple[str, ...]  # in forward order
    unused: tuple[str, ...]  # batch norms that no image reached; they are unchanged
    num_images: int  # over all processes


def recompute_statistics(
    model: nn.Module,
    batches: Iterable,
    normalizer: InputNormalizer | None = None,
    *,
    layer_inputs: str = "batch",
    micro_batch: int = 0,
    world: World | None = None,
    autocast: torch.dtype | None = None,
) -> BatchNormReport:
    """Replaces the running statistics of all batch norms by statistics of the given images.

    Each gets the mean and the population variance of its input over all images and positions,
    merged in float64. Other layers run in evaluation mode (no dropout). Frozen batch norms do not
    change. Modes, momentum and ``num_batches_tracked`` are restored, and after an error the
    statistics, too.

    Args:
        batches: this process's part of the training set, with the augmentation of training:
            batches with ``images`` (and ``shift``) for ``normalizer``, or plain tensors.
        normalizer: the network's preprocessing; ``None`` if batches are normalized already.
        layer_inputs: the statistics with which earlier batch norms normalize. "batch": of their
            micro-batch, as in training, in one pass. "population": the new statistics, as in
            testing, so that each layer's statistics match its input exactly. This takes one pass
            for each batch norm, so ``batches`` must be iterable repeatedly with the same images.
        micro_batch: images that are normalized together, 0 for a whole batch. Use the value of
            training (the paper: 32); the last micro-batch of a batch may be smaller.
        world: the processes that share the training set; all call this function and get the same
            statistics. With SyncBatchNorm and "batch" they need equal numbers of batches.
        autocast: ``torch.bfloat16`` or ``torch.float16``, the precision of training.

    Raises:
        UsageError: no batch norm, no images, non-finite input.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    if not layers:
        raise UsageError("the network has no batch norm with running statistics")
    work = _Pass(model, layers, batches, normalizer, micro_batch, world or World(), autocast)
    new: dict[str, Moments] = {}
    with torch.no_grad(), evaluation_mode(model), _unchanged_by_itself(layers.values()):
        if layer_inputs == "batch":
            passes = [list(layers)]
            for layer in layers.values():
                layer.train()
        else:
            passes = [[name] for name in work.world.broadcast(work.order_of_layers())]
        for names in passes:
            found = work.collect(names, stop=layer_inputs == "population")
            for name, moments in found.items():
                layers[name].running_mean.copy_(moments.mean)
                layers[name].running_var.copy_(moments.variance)
            new |= found
    unused = tuple(name for name in layers if name not in new)
    return BatchNormReport(tuple(new), unused, work.num_images)


@dataclass(frozen=True)
class TrainingImages:
    """This process's part of the first images of training, each exactly once.

    With SyncBN, which needs equally many batches on all processes, only whole iterations count.
    """

    source: Any  # batches by iteration, see `resnet_backbone.classification.data`
    count: int  # images over all processes; 0 for one epoch
    batch_size: int  # of an iteration, over all processes
    world: World
    before_each: Callable[[], None] = lambda: None  # called equally often on all processes
    sync_bn: bool = False  # whether the network has SyncBN

    def __iter__(self) -> Iterator[Any]:
        count = self.count or self.source.num_samples
        if self.sync_bn:
            count = max(1, count // self.batch_size) * self.batch_size
        batches = iter(self.source.batches(0))
        local = self.batch_size // self.world.size
        for first in range(0, count, self.batch_size):
            self.before_each()
            batch = next(batches)
            left = max(0, count - first - self.world.rank * local)
            if left:
                yield type(batch)(*(None if part is None else part[:left] for part in batch))


class _Reached(Exception):
    """Ends a forward pass at the requested layer."""


@dataclass
class _Pass:
    """Runs the images through the network and collects moments of layers' inputs."""

    network: nn.Module
    layers: dict[str, _BatchNorm]
    batches: Iterable
    normalizer: InputNormalizer | None
    micro_batch: int
    world: World
    autocast: torch.dtype | None
    num_images: int = 0

    def order_of_layers(self) -> list[str]:
        """Returns the layers in forward order, from one micro-batch."""
        order: list[str] = []
        with self.hooked(self.layers, lambda name, _: order.append(name)):
            for inputs in self.inputs():
                self.forward(inputs)
                break
        twice = sorted({name for name in order if order.count(name) > 1})
        if twice:
            raise UsageError(
                f"{twice[0]} runs more than once in a forward pass: use layer_inputs 'batch'"
            )
        return order

    def collect(self, names: Iterable[str], stop: bool) -> dict[str, Moments]:
        """Returns the moments of layers' inputs over all images of all processes, on each of them.

        With `stop`, forward passes end at the first of these layers.
        """
        mine: dict[str, Moments] = defaultdict(Moments)
        images = 0

        def add(name: str, x: Tensor) -> None:
            mine[name] += Moments.of(x)
            if stop:
                raise _Reached

        with self.hooked(names, add):
            for inputs in self.inputs():
                images += len(inputs)
                with suppress(_Reached):
                    self.forward(inputs)
        on_cpu = {n: Moments(m.count, m.mean.cpu(), m.deviations.cpu()) for n, m in mine.items()}
        shares = self.world.gather((on_cpu, images))
        self.num_images = sum(images for _, images in shares)
        if not self.num_images:
            raise UsageError("there are no images to compute statistics from")
        merged: dict[str, Moments] = defaultdict(Moments)
        for name, moments in chain.from_iterable(part.items() for part, _ in shares):
            merged[name] += moments
        for name, moments in merged.items():
            if not (moments.mean.isfinite().all() and moments.deviations.isfinite().all()):
                raise UsageError(f"the input of {name} is not finite; did the training diverge?")
        return merged

    @contextmanager
    def hooked(self, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Calls `see` with a layer's name and input before the layer runs."""
        with ExitStack() as hooks:
            for name in names:
                note = partial(lambda name, _, args: see(name, *args), name)
                hooks.callback(self.layers[name].register_forward_pre_hook(note).remove)
            yield

    def inputs(self) -> Iterator[Tensor]:
        """Yields the network's input, one micro-batch at a time.

        A last one of one image, too few for a batch norm of a 1x1 map, joins the one before.
        """
        held = None
        for part in self.micro_batches():
            if held is not None and len(part) == 1 < len(held):
                held = torch.cat([held, part])
                continue
            if held is not None:
                yield held
            held = part
        if held is not None:
            yield held

    def micro_batches(self) -> Iterator[Tensor]:
        device = next(self.network.parameters()).device
        for batch in self.batches:
            images = getattr(batch, "images", batch)
            if self.normalizer is not None:
                images = self.normalizer(images, getattr(batch, "shift", None))
            yield from images.to(device).split(self.micro_batch or len(images))

    def forward(self, inputs: Tensor) -> None:
        with torch.autocast(
            inputs.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            self.network(inputs)


@contextmanager
def _unchanged_by_itself(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Keeps forward passes from updating running statistics, and restores them after an error."""
    momenta = [(layer, layer.momentum) for layer in layers]
    buffers = [(b, b.clone()) for layer, _ in momenta for b in layer.buffers(recurse=False)]
    for layer, _ in momenta:
        layer.momentum = 0.0
    try:
        yield
    except BaseException:
        for buffer, before in buffers:
            buffer.copy_(before)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for buffer, before in buffers:
            if not buffer.is_floating_point():  # num_batches_tracked
                buffer.copy_(before)

"""Batch-norm statistics against direct computations in float64."""

import copy
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from drawn_networks import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_backbone.classification import batch_norm
from resnet_backbone.classification.batch_norm import Moments, TrainingImages, recompute_statistics
from resnet_backbone.classification.data.sources import ArraySource, Batch, SampleStream
from resnet_backbone.models import FrozenBatchNorm2d, build_model
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.processes import World
from resnet_backbone.weights import Preprocessing
from resnet_backbone.weights.preprocessing import InputNormalizer


def inputs(count=12, size=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator) * 2 + 1


def small(seed=0):
    """A residual network of float64 whose batch norms are far from the identity."""
    torch.manual_seed(seed)
    return randomize(build_model("cifar_resnet8", shortcut="B")).double().train()


def batch_norms(model):
    return {k: m for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def inputs_of(model, x):
    """name -> the input of each batch norm in a forward pass, in the mode the model is in."""
    found = {}
    with torch.no_grad(), ExitStack() as stack:
        for name, layer in batch_norms(model).items():
            note = partial(lambda name, _, args: found.update({name: args[0]}), name)
            stack.callback(layer.register_forward_pre_hook(note).remove)
        model(x)
    return found


def assert_statistics(layer, x):
    found, bounds = (layer.running_mean, layer.running_var), dict(rtol=1e-10, atol=1e-12)
    expected = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(found, expected, **bounds)


def test_under_batch_statistics_equals_a_direct_computation():
    model, x = small(), inputs(10).double()
    expected = copy.deepcopy(model).train()
    parts = [inputs_of(expected, part) for part in (*x[:8].split(3), x[8:])]
    recompute_statistics(model, [x[:8], x[8:]], micro_batch=3)
    for name, layer in batch_norms(model).items():
        assert_statistics(layer, torch.cat([part[name] for part in parts]))


@pytest.mark.parametrize("micro_batch", [0, 1, 5])
def test_population_statistics_are_those_of_testing(micro_batch):
    model, x = small(), inputs(7).double()
    options = dict(layer_inputs="population", micro_batch=micro_batch)
    report = recompute_statistics(model, x.split(4), **options)
    assert set(report.layers) == set(batch_norms(model)) and not report.unused
    assert report.layers[0] == "stem.norm" and report.num_images == 7
    for name, found in inputs_of(model.eval(), x).items():
        assert_statistics(batch_norms(model)[name], found)


def test_what_is_not_a_statistic_stays():
    model = small()
    model.res2[0].conv1.norm.momentum = None
    model.res3.eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    modes = [m.training for m in model.modules()]
    momenta = [m.momentum for m in batch_norms(model).values()]
    for layer_inputs in ("batch", "population"):
        recompute_statistics(model, [inputs().double()], layer_inputs=layer_inputs)
        after = model.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert modes == [m.training for m in model.modules()]
        assert momenta == [m.momentum for m in batch_norms(model).values()]
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_after_an_error_everything_is_as_before():
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bad = inputs().double()
    bad[3, 1, 2, 2] = float("nan")
    with pytest.raises(UsageError, match="the input of stem.norm is not finite"):
        recompute_statistics(model, [inputs().double(), bad])

    broken = map({0: inputs().double()}.__getitem__, range(2))  # fails at the second batch
    with pytest.raises(KeyError):
        recompute_statistics(model, broken)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert {m.momentum for m in batch_norms(model).values()} == {0.1}
    assert all(m.training for m in model.modules())


def test_frozen_and_unused_layers():
    model = small()
    model.freeze(1)
    model.aside = nn.BatchNorm2d(3)
    assert isinstance(model.stem.norm, FrozenBatchNorm2d)
    constants = model.stem.norm.running_mean.clone()
    report = recompute_statistics(model, [inputs().double()])
    assert torch.equal(model.stem.norm.running_mean, constants)
    assert report.unused == ("aside",) and torch.equal(model.aside.running_mean, torch.zeros(3))
    assert "stem.norm" not in report.layers
    model.freeze(5)
    del model.aside
    with pytest.raises(UsageError, match="no batch norm with running statistics"):
        recompute_statistics(model, [])


def test_dropout_is_off():
    model, x = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)).double(), inputs().double()
    recompute_statistics(model, [x])
    assert_statistics(model[1], x)


def test_batches_of_the_trainer():
    """uint8 images with color noise go through the preprocessing."""
    mean, std = (100.0, 110.0, 120.0), (60.0, 61.0, 62.0)
    normalizer = InputNormalizer(Preprocessing("BGR", 255.0, mean, std))
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    shift = torch.randn(6, 3) * 10
    model = nn.Sequential(nn.BatchNorm2d(3))
    recompute_statistics(model, [Batch(images, torch.zeros(6), shift)], normalizer)
    pixels = (images.double() + shift.double()[:, :, None, None]).flip(1)
    expected = (pixels.mean((0, 2, 3)) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(model[0].running_mean.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [9, 13])
def test_one_image_is_not_normalized_alone(count):
    """The last batch of 9, and the last micro-batch of 13, in a network whose map is 1x1."""

    class Source:
        num_samples = count

        def batches(self, first):
            while True:
                yield Batch(torch.randint(0, 256, (8, 3, 1, 1), dtype=torch.uint8), torch.zeros(8))

    model = nn.Sequential(nn.BatchNorm2d(3))
    normalizer = InputNormalizer(Preprocessing("RGB", 255.0, (0.0,) * 3, (1.0,) * 3))
    images = TrainingImages(Source(), 0, 8, World())
    report = recompute_statistics(model, images, normalizer, micro_batch=4)
    assert report.num_images == count


def test_wrong_use():
    with pytest.raises(UsageError, match="there are no images"):
        recompute_statistics(small(), [])
    shared = nn.BatchNorm2d(3).double()
    with pytest.raises(UsageError, match="0 runs more than once"):
        twice = nn.Sequential(shared, shared)
        recompute_statistics(twice, [inputs().double()], layer_inputs="population")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_moments_are_those_of_all_values(sizes, offset, seed):
    """Far from zero, where a sum of squares would lose all digits of the variance."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 2, 3, dtype=torch.double, generator=generator) + offset for n in sizes]
    merged = sum(map(Moments.of, parts), Moments())
    rows = torch.cat(parts).transpose(0, 1).flatten(1)
    assert merged.count == rows.shape[1]
    torch.testing.assert_close(merged.mean, rows.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.variance, rows.var(1, correction=0), rtol=1e-7, atol=1e-9)


def statistics(world, parts):
    found = {}
    for layer_inputs in batch_norm.LAYER_INPUTS:
        model, options = small(), dict(layer_inputs=layer_inputs, world=world)
        report = recompute_statistics(model, parts[world.rank], **options)
        found[layer_inputs] = report, model.state_dict()
    return found


def test_two_processes_give_the_statistics_of_one(two_processes):
    x = inputs(9).double()
    parts = [[x[0:3], x[5:9]], [x[3:5]]]  # unequal shares
    alone = statistics(World(), [parts[0] + parts[1]])
    first, second = two_processes(statistics, parts)
    for name, (expected, model) in alone.items():
        assert first[name][0] == second[name][0] == expected and expected.num_images == 9
        for key, value in model.items():
            assert torch.equal(first[name][1][key], second[name][1][key])
            torch.testing.assert_close(first[name][1][key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 7, 12, 29])
def test_training_images_are_each_there_once(world_size, count):
    """29 images in batches of 12, over several processes: nothing twice, nothing left out."""
    seen = []
    images = torch.zeros(29, 3, 4, 4, dtype=torch.uint8)
    for rank in range(world_size):
        stream, calls = SampleStream(29, 12, 5, rank, world_size), []
        source = ArraySource(images, torch.arange(29), stream, augmentation="none")
        note = partial(calls.append, 1)
        batches = list(batch_norm.TrainingImages(source, count, 12, World(rank, world_size), note))
        assert all(len(batch.images) == len(batch.labels) > 0 for batch in batches)
        assert len(calls) == -(-(count or 29) // 12)
        seen += [label for batch in batches for label in batch.labels.tolist()]
    assert len(seen) == len(set(seen)) == (count or 29)

"""Sparse backward passes beside PyTorch's dense ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resnet_backbone.fast import sparse
from resnet_backbone.fast.sparse import Conv3x3, ProposalHead, can_be_sparse, inputs_of

SHAPES = ((2, 5, 7, 10), (6, 5, 3, 3), (6,), (4, 6, 1, 1), (4,))  # x, two layers


def dense_conv(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def dense_head(x, weight, bias, last, last_bias):
    return F.conv2d(dense_conv(x, weight, bias).relu(), last, last_bias)


@pytest.fixture
def paths(monkeypatch):
    """The number of cells of each sparse pass."""
    counts, function = [], sparse.gradients_of_cells

    def counted(x, weight, cells, *more):
        counts.append(len(cells))
        return function(x, weight, cells, *more)

    monkeypatch.setattr(sparse, "gradients_of_cells", counted)
    return counts


@pytest.mark.parametrize("at_once", [3, 1000])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("cells", [0, 1, 30, 40, 140])
@pytest.mark.parametrize("found, expected", [(Conv3x3, dense_conv), (ProposalHead, dense_head)])
def test_gradients_are_those_of_the_dense_pass(
    found, expected, cells, layout, at_once, paths, monkeypatch
):
    """Cells at the border and inside, of both images; many ones take the dense pass."""
    monkeypatch.setattr(sparse, "CELLS_AT_ONCE", at_once)
    monkeypatch.setattr(sparse, "SAMPLED", 1)
    generator = torch.Generator().manual_seed(cells)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    inputs[0] = inputs[0].contiguous(memory_format=layout)
    inputs = [one.requires_grad_() for one in inputs[: 3 if found is Conv3x3 else 5]]
    outputs = [function(*inputs) for function in (found.apply, expected)]
    torch.testing.assert_close(*outputs)
    chosen = torch.randperm(140, generator=generator).view(2, 1, 7, 10) < cells
    grad = torch.randn(outputs[0].shape, generator=generator) * chosen
    torch.testing.assert_close(*(torch.autograd.grad(one, inputs, grad) for one in outputs))
    assert paths == ([] if cells > (0.25 * 140 if found is Conv3x3 else at_once) else [cells])


@pytest.mark.parametrize("cell, is_dense", [((8, 4), True), ((8, 5), False)])
def test_a_sample_of_cells_chooses_the_pass(cell, is_dense, paths):
    x, grad = torch.randn(1, 5, 12, 8, requires_grad=True), torch.zeros(1, 6, 12, 8)
    weight, bias = (torch.randn(shape) for shape in SHAPES[1:3])
    grad[0, 3, 0, 4] = grad[0, 1, cell[0], cell[1]] = 1  # two or one of six sampled cells
    found = torch.autograd.grad(Conv3x3.apply(x, weight, bias), x, grad)
    torch.testing.assert_close(found, torch.autograd.grad(dense_conv(x, weight, bias), x, grad))
    assert paths == ([] if is_dense else [2])


def test_bf16_is_as_exact_as_the_dense_pass():
    """Gradients of autocast, dense and sparse, beside those of double precision."""
    torch.manual_seed(0)
    conv, last = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 15, 1)
    x = torch.randn(1, 64, 40, 50).bfloat16()
    grad = torch.randn(1, 15, 40, 50) * (torch.rand(1, 1, 40, 50) < 0.05)
    wanted = [conv.weight, conv.bias, last.weight, last.bias]
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        hidden = conv(leaf).relu()
        with torch.autocast("cpu", enabled=False):
            found.append((last(hidden.float()), [leaf, *wanted]))
        leaf = x.clone().requires_grad_()
        found.append((ProposalHead.apply(*inputs_of(conv, leaf), *wanted[2:]), [leaf, *wanted]))
    inputs = [one.detach().double().requires_grad_() for one in (x, *wanted)]
    exact = dense_head(*inputs)
    expected = torch.autograd.grad(exact, inputs, grad.double())
    dense, ours = (torch.autograd.grad(*one, grad) for one in found)
    assert found[0][0].dtype == found[1][0].dtype == torch.float32
    for one, other, reference in zip(dense, ours, expected, strict=True):
        error, most = ((value - reference).norm() / reference.norm() for value in (other, one))
        assert error < 1.1 * most + 1e-6 < 0.1


def test_what_can_be_sparse():
    x, conv = torch.rand(1, 4, 8, 8), nn.Conv2d(4, 4, 3, padding=1)
    assert can_be_sparse(conv, x)
    changes = [dict(stride=2), dict(groups=2), dict(dilation=2), dict(bias=False)]
    changes += [dict(padding=0), dict(padding_mode="reflect"), dict(kernel_size=1)]
    plain = dict(in_channels=4, out_channels=4, kernel_size=3, padding=1)
    others = [nn.Conv2d(**{**plain, **change}) for change in changes]
    normed = copy.deepcopy(conv)
    normed.norm = nn.BatchNorm2d(4)
    assert not any(can_be_sparse(other, x) for other in [*others, normed])
    assert not can_be_sparse(conv, x.to("meta"))
    assert not can_be_sparse(conv, x.double())
    with torch.no_grad():
        assert not can_be_sparse(conv, x)
    assert can_be_sparse(conv, x)


def small_inputs(function) -> list:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    return inputs[: 3 if function is Conv3x3 else 5]


@pytest.mark.parametrize("function", [Conv3x3, ProposalHead])
def test_gradients_can_be_differentiated(function):
    inputs = small_inputs(function)
    assert torch.autograd.gradgradcheck(function.apply, inputs)


@pytest.mark.parametrize("frozen", [[0], [1, 2], [0, 2]])
@pytest.mark.parametrize("function, dense", [(Conv3x3, dense_conv), (ProposalHead, dense_head)])
def test_frozen_inputs_get_no_gradient(function, dense, frozen):
    found = []
    for call in (function.apply, dense):
        torch.manual_seed(0)
        inputs = small_inputs(function)
        for index in frozen:
            inputs[index].requires_grad_(False)
        output = call(*inputs)
        output[0, 1:3, 2, 4].sum().backward()
        found.append([one.grad for one in inputs])
    assert [one is None for one in found[0]] == [i in frozen for i in range(len(inputs))]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_arrives(value):
    found = []
    for call in (ProposalHead.apply, dense_head):
        torch.manual_seed(0)
        inputs, grad = small_inputs(ProposalHead), torch.zeros(2, 4, 7, 10, dtype=torch.float64)
        grad[1, 2, 3, 4] = value
        found.append(torch.autograd.grad(call(*inputs), inputs[1:], grad))
    ours, theirs = ([bool(one.isfinite().all()) for one in grads] for grads in found)
    assert ours == theirs and not ours[0]

"""The step path; learning-rate policies, against PyTorch's schedulers where there are such."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from resnet_backbone.classification.networks import logits_of
from resnet_backbone.classification.step import Schedule, TrainStep, build_sgd, set_rate
from resnet_backbone.classification.trainer import Window
from resnet_backbone.models import build_model
from resnet_backbone.runtime.processes import STEP, World, seed_everything


def batch(count=8, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return images, torch.randint(0, classes, (count,), generator=generator)


def make(model=None, rate=0.05, mixer=None, weight_decay=1e-4, **options):
    torch.manual_seed(0)
    model = model or build_model("cifar_resnet8")
    optimizer = build_sgd(model, 0.9, weight_decay)
    set_rate(optimizer, rate)
    return TrainStep(model, optimizer, World(), mixer, **options)


def weights(step):
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


@pytest.mark.parametrize("form", ["caffe", "pytorch"])
def test_momentum_forms_by_hand(form):
    """A rate that changes all the time, against the two update rules written out in float64."""
    gradients, rates = [1.0, -2.0, 0.5, 4.0, 1.0, 1.0], [0.1, 0.1, 0.01, 0.02, 0.02, 0.001]
    w, v = 3.0, 0.0
    parameter = nn.Parameter(torch.tensor([w], dtype=torch.float64))
    optimizer = build_sgd(nn.ParameterList([parameter]), 0.9, 0.01)
    for gradient, rate in zip(gradients, rates, strict=True):
        set_rate(optimizer, rate, form)
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        g = gradient + 0.01 * w
        if form == "caffe":
            v = 0.9 * v + rate * g
            w -= v
        else:
            v = 0.9 * v + g
            w -= rate * v
        assert parameter.item() == pytest.approx(w, rel=1e-12)


def test_weight_decay_can_leave_out_norms_and_biases():
    model = build_model("cifar_resnet8")
    everything = build_sgd(model, 0.9, 1e-4).param_groups
    assert len(everything) == 1
    decayed, plain = build_sgd(model, 0.9, 1e-4, decay_norm_and_bias=False).param_groups
    assert plain["weight_decay"] == 0 and all(p.ndim == 1 for p in plain["params"])
    assert decayed["weight_decay"] == 1e-4 and all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(everything[0]["params"])


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_slopes_of_prelu_are_never_decayed(decay_norm_and_bias):
    model = build_model("cifar_resnet8", activation="prelu")
    slopes = {id(m.weight) for m in model.modules() if isinstance(m, nn.PReLU)}
    decayed, plain = build_sgd(model, 0.9, 1e-4, decay_norm_and_bias).param_groups
    assert plain["weight_decay"] == 0 and decayed["weight_decay"] == 1e-4
    assert slopes <= {id(p) for p in plain["params"]}
    assert (len(slopes) == len(plain["params"])) == decay_norm_and_bias


def test_a_step_is_plain_sgd():
    step = make(rate=0.1, weight_decay=0.0)
    reference = copy.deepcopy(step.model).train()
    images, labels = batch()
    loss, wrong = step(images, labels, 0)
    logits = reference(images)
    expected = nn.functional.cross_entropy(logits, labels)
    expected.backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= 0.1 * parameter.grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert wrong.item() == (logits.argmax(1) != labels).sum().item()
    torch.testing.assert_close(list(step.model.parameters()), list(reference.parameters()))


def test_micro_batches_share_the_gradient_and_have_their_own_statistics():
    """Without BN, micro-batches change nothing; with BN, each is normalized by itself."""
    images, labels = batch(8)
    whole = make(build_model("cifar_resnet8", norm=""), rate=0.01)
    parts = make(copy.deepcopy(whole.model), rate=0.01, micro_batch=2)
    torch.testing.assert_close(whole(images, labels, 0), parts(images, labels, 0))
    torch.testing.assert_close(weights(whole), weights(parts))

    parts = make(micro_batch=4)
    reference = copy.deepcopy(parts.model).train()
    loss, _ = parts(images, labels, 0)
    logits = torch.cat([reference(half) for half in images.split(4)])
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))
    norm = next(m for m in parts.model.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 2
    assert make()(images, labels, 0)[0] != loss  # statistics of 8 are others


def test_clipping_bounds_the_update():
    step = make(rate=1.0, clip_norm=0.01, weight_decay=0.0)
    before = weights(step)
    step(*batch(), 0)
    assert (weights(step) - before).norm() == pytest.approx(0.01, rel=1e-3)


def test_bf16_is_near_fp32():
    images, labels = batch(16)
    exact, rough = make(), make(amp="bf16")
    losses = [step(images, labels, 0)[0] for step in (exact, rough)]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)
    change, error = (weights(exact) - weights(other) for other in (make(), rough))
    assert 0 < error.norm() < 0.1 * change.norm()
    assert all(p.dtype == torch.float32 for p in rough.model.parameters())


def test_ema_by_hand():
    step, average = make(ema=0.3), None  # reached after three steps
    for iteration in range(4):
        step(*batch(), iteration)
        now = weights(step)
        decay = 0.0 if average is None else min(0.3, (1 + iteration) / (10 + iteration))
        average = now if average is None else decay * average + (1 - decay) * now
    found = torch.cat([p.flatten() for p in step.evaluated_model.parameters()])
    torch.testing.assert_close(found, average)
    assert isinstance(step.ema, AveragedModel) and step.evaluated_model is not step.model
    running = [m.running_mean for m in step.evaluated_model.modules() if hasattr(m, "running_mean")]
    assert any(mean.abs().sum() > 0 for mean in running)


def soften(images, labels, iteration):
    return images, nn.functional.one_hot(labels, 10).float() * 0.7 + 0.03


@pytest.mark.parametrize("smoothing, mixer", [(0.1, None), (0.0, soften), (0.1, soften)])
def test_smoothed_and_mixed_labels(smoothing, mixer):
    images, labels = batch()
    step = make(mixer=mixer, label_smoothing=smoothing)
    logits = copy.deepcopy(step.model).train()(images)
    targets = mixer(images, labels, 0)[1] if mixer else labels
    expected = nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    loss, wrong = step(images, labels, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert wrong.item() == (logits.argmax(1) != labels).sum().item()


def test_auxiliary_classifiers_count():
    """GoogLeNet returns three logits in training; the loss is main + 0.3 (first + second)."""
    main, first, second = (torch.randn(2, 5) for _ in range(3))
    logits, others = logits_of((main, first, second))
    assert logits is main and [weight for weight, _ in others] == [0.3, 0.3]
    assert logits_of((main, None, None)) == (main, [])
    assert logits_of(main) == (main, [])

    class ThreeHeads(nn.Conv2d):
        def forward(self, x):
            flat = super().forward(x).mean((2, 3))
            return flat, -flat, None

    images, labels = batch(classes=5)
    step = make(ThreeHeads(3, 5, 1))
    flat, *_ = step.model(images)
    cross = nn.functional.cross_entropy
    expected = cross(flat, labels) + 0.3 * cross(-flat, labels)
    assert step(images, labels, 0)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_random_layers_depend_on_the_iteration_alone():
    """Dropout draws from (seed, iteration): a resumed run has no generator state to restore."""
    images, labels = batch(32)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 10))

    def loss(iteration, seed=0):
        return make(copy.deepcopy(model), rate=0.0, seed=seed)(images, labels, iteration)[0].item()

    first = loss(3)
    torch.rand(7)
    assert loss(3) == first
    assert loss(4) != first and loss(3, seed=1) != first
    # those of a seeding that is documented, and not of Python's own hash
    make(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), seed=5)(*batch(4), 3)
    drawn = torch.rand(1)
    seed_everything(STEP, 5, 3, 0)
    assert torch.equal(drawn, torch.rand(1))


def test_exact_resume_of_the_state():
    whole, first = make(ema=0.5), make(ema=0.5)
    for iteration in range(2):
        whole(*batch(), iteration), first(*batch(), iteration)
    second = make(copy.deepcopy(first.model), ema=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for iteration in range(2, 4):
        whole(*batch(), iteration), second(*batch(), iteration)
    assert torch.equal(weights(whole), weights(second))
    averages = (step.evaluated_model.parameters() for step in (whole, second))
    assert all(map(torch.equal, *averages))


@pytest.mark.slow
def test_compiled_step_is_the_same_and_leaves_no_traces():
    images, labels = batch()
    plain, compiled = make(), make(compile="default")
    losses = [step(images, labels, 0)[0] for step in (compiled, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(plain), weights(compiled), rtol=1e-4, atol=1e-6)
    assert not any("_orig_mod" in key for key in compiled.model.state_dict())


def half_a_window(world):
    window = Window(4, world.device)
    window.add(torch.tensor(1.0 + world.rank), torch.tensor(3 + world.rank))
    return window.state_dict(world)


def test_the_errors_of_two_processes_count_once_in_any_number(two_processes):
    state, _ = two_processes(half_a_window)
    windows = [Window(4, "cpu") for _ in range(3)]
    for rank, window in enumerate(windows):
        window.load_state_dict(state, World(rank, 3))
    assert [window.losses[0] for window in windows] == [1.5] * 3  # their mean
    assert sum(window.wrong for window in windows) == 3 + 4


def torch_rates(scheduler, iterations, *settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    made, rates = scheduler(optimizer, *settings), []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return rates


def test_steps_are_torchs_multistep():
    ours = Schedule(lr=0.1, iterations=20, milestones=[8, 15])
    assert not any(ours.observe_validation(50) for _ in range(20))
    theirs = torch_rates(torch.optim.lr_scheduler.MultiStepLR, 20, [8, 15])
    assert [ours.at(i) for i in range(20)] == pytest.approx(theirs)


@given(st.integers(1, 40))
def test_cosine_is_torchs(iterations):
    ours = Schedule(lr=0.1, iterations=iterations, policy="cosine")
    theirs = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR, iterations, iterations)
    assert [ours.at(i) for i in range(iterations)] == pytest.approx(theirs, abs=1e-9)


def test_linear_warmup_ends_at_the_rate():
    schedule = Schedule(lr=0.4, iterations=20, warmup_iterations=4, warmup_lr=0.1)
    assert [schedule.at(i) for i in range(6)] == pytest.approx([0.175, 0.25, 0.325, 0.4, 0.4, 0.4])
    cosine = Schedule(lr=0.4, iterations=24, policy="cosine", warmup_iterations=4)
    assert cosine.at(3) == pytest.approx(0.4) and cosine.at(14) == pytest.approx(0.2)


def test_warmup_by_error_is_the_papers():
    schedule = Schedule(milestones=[32000], warmup_lr=0.01, warmup_until_error=80)
    assert schedule.at(0) == 0.01
    assert not schedule.observe_training(85.0)
    assert schedule.at(400) == 0.01
    assert schedule.observe_training(79.9)
    assert schedule.at(401) == 0.1
    assert not schedule.observe_training(95.0) and schedule.at(402) == 0.1  # for good
    assert schedule.at(32000) == pytest.approx(0.01)


STEADY = [30 - 0.02 * n for n in range(5)]  # PyTorch's relative threshold calls this progress


@pytest.mark.parametrize(
    "errors, options, drops",
    [
        ([50, 40, 40, 40, 39, 39, 39], (2, 0.1), [3, 6]),
        (STEADY, (3, 0.1), [3]),
        # counted from the best that was progress, so that slow but steady progress does count
        ([30 - 0.11 * n for n in range(9)], (2, 0.1), []),
        ([50] * 30, (1, 0.1), [1, 2, 3]),  # so often at most
    ],
)
def test_plateau_waits_and_drops(errors, options, drops):
    names = ("plateau_patience", "plateau_threshold")
    schedule = Schedule(policy="plateau", plateau_drops=3, **dict(zip(names, options, strict=True)))
    assert [n for n, error in enumerate(errors) if schedule.observe_validation(error)] == drops
    assert schedule.at(0) == pytest.approx(0.1 ** (1 + len(drops)))


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(0, 30))
def test_state_goes_on_where_it_was(errors, place):
    options = dict(policy="plateau", plateau_patience=2, warmup_lr=0.01, warmup_until_error=60)
    whole, first, second = (Schedule(**options) for _ in range(3))
    for number, error in enumerate(errors):
        if number == place:
            second.load_state_dict(first.state_dict())
        for schedule in (whole, first if number < place else second):
            schedule.observe_validation(error), schedule.observe_training(error)
    second = second if place < len(errors) else first
    assert second.state_dict() == whole.state_dict()
    assert math.isclose(second.at(3), whole.at(3))

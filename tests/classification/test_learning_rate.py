"""Learning-rate policies, against PyTorch's schedulers where there are such."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_backbone.classification.optimizer import Schedule


def torch_rates(make, iterations):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = make(optimizer)
    rates = []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_steps_are_torchs_multistep():
    ours = Schedule(0.1, 20, milestones=[8, 15])
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [8, 15]), 20)
    assert [ours.at(i) for i in range(20)] == pytest.approx(theirs)


@given(st.integers(1, 40))
def test_cosine_is_torchs(iterations):
    ours = Schedule(0.1, iterations, policy="cosine")
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, iterations), iterations
    )
    assert [ours.at(i) for i in range(iterations)] == pytest.approx(theirs, abs=1e-9)


def test_linear_warmup_ends_at_the_rate():
    rates = [Schedule(0.4, 20, warmup_iterations=4, warmup_lr=0.1).at(i) for i in range(6)]
    assert rates == pytest.approx([0.175, 0.25, 0.325, 0.4, 0.4, 0.4])
    cosine = Schedule(0.4, 24, "cosine", warmup_iterations=4)
    assert cosine.at(3) == pytest.approx(0.4) and cosine.at(14) == pytest.approx(0.2)


def test_warmup_by_error_is_the_papers():
    schedule = Schedule(0.1, 64000, milestones=[32000], warmup_lr=0.01, warmup_until_error=80)
    assert schedule.at(0) == 0.01
    assert not schedule.observe_training(85.0)
    assert schedule.at(400) == 0.01
    assert schedule.observe_training(79.9)
    assert schedule.at(401) == 0.1
    assert not schedule.observe_training(95.0) and schedule.at(402) == 0.1  # for good
    assert schedule.at(32000) == pytest.approx(0.01)


def drops(errors, **options):
    schedule = Schedule(0.1, 100, "plateau", **options)
    return [schedule.observe_validation(error) for error in errors], schedule


def test_plateau_waits_and_drops():
    observed, schedule = drops([50, 40, 40, 40, 39, 39, 39], patience=2, threshold=0.1)
    assert observed == [False, False, False, True, False, False, True]
    assert schedule.at(0) == pytest.approx(0.001)


def test_plateau_threshold_is_absolute():
    """0.02 points better each time is no progress at a threshold of 0.1; PyTorch's default, a
    relative 1e-4, would call it progress for ever."""
    errors = [30 - 0.02 * number for number in range(5)]
    assert drops(errors, patience=3, threshold=0.1)[0] == [False, False, False, True, False]
    # counted from the best that was progress, so that slow but steady progress does count
    assert not any(drops([30 - 0.11 * n for n in range(9)], patience=2, threshold=0.1)[0])


def test_plateau_drops_at_most_so_often():
    _, schedule = drops([50] * 30, patience=1, max_drops=3)
    assert schedule.state.drops == 3 and schedule.at(0) == pytest.approx(1e-4)


def test_other_policies_do_not_watch():
    schedule = Schedule(0.1, 100, milestones=[50])
    assert not any(schedule.observe_validation(50) for _ in range(20))


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(0, 30))
def test_state_goes_on_where_it_was(errors, place):
    options = dict(policy="plateau", patience=2, warmup_lr=0.01, warmup_until_error=60)
    whole, first = (Schedule(0.1, 100, **options) for _ in range(2))
    for error in errors:
        whole.observe_validation(error), whole.observe_training(error)
    for error in errors[:place]:
        first.observe_validation(error), first.observe_training(error)
    second = Schedule(0.1, 100, **options)
    second.load_state_dict(first.state_dict())
    for error in errors[place:]:
        second.observe_validation(error), second.observe_training(error)
    assert second.state_dict() == whole.state_dict()
    assert math.isclose(second.at(3), whole.at(3))

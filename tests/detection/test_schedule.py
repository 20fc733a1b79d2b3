"""The linear rule: learning rate and iterations follow the batch."""

import pytest

pytest.importorskip("detectron2")
pytest.importorskip("hypothesis")

import torch
from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_backbone.detection import add_resnet_backbone_config
from resnet_backbone.detection.schedule import scale_schedule


def plan(max_iter=18000, steps=(12000, 16000), reference=16, batch=16):
    cfg = add_resnet_backbone_config(get_cfg())
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 0.02, 100
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = max_iter, steps
    cfg.RESNET_BACKBONE.REFERENCE_BATCH, cfg.SOLVER.IMS_PER_BATCH = reference, batch
    return cfg


def scale(planned, batch=None, **given):
    """The scaled config and the report, with the user's overrides applied as train_net does."""
    cfg = planned.clone()
    if batch:
        given["IMS_PER_BATCH"] = batch
    for key, value in given.items():
        cfg.SOLVER[key] = value
    report = scale_schedule(cfg, planned, [f"SOLVER.{key}" for key in given])
    return cfg.SOLVER, report


def test_published_example():
    solver, report = scale(plan(), batch=2)
    assert solver.BASE_LR == pytest.approx(0.0025)
    assert (solver.MAX_ITER, solver.STEPS) == (144000, (96000, 128000))
    assert solver.WARMUP_ITERS == 800
    assert report[0] == "SOLVER.BASE_LR 0.02 -> 0.0025 (for 2 images per batch, planned for 16)"
    assert len(report) == 4


def test_larger_batch():
    solver, _ = scale(plan(), batch=64)
    assert solver.BASE_LR == pytest.approx(0.08)
    assert (solver.MAX_ITER, solver.STEPS) == (4500, (3000, 4000))
    assert solver.WARMUP_ITERS == 100


@pytest.mark.parametrize("reference", [16, 0])
def test_nothing_to_do(reference):
    planned = plan(reference=reference)
    solver, report = scale(planned)
    assert report == [] and solver == planned.SOLVER


def test_short_run_keeps_the_shape_and_says_why():
    solver, report = scale(plan(), MAX_ITER=90)
    assert (solver.STEPS, solver.WARMUP_ITERS, solver.BASE_LR) == ((60, 80), 22, 0.02)
    assert report == [
        "SOLVER.STEPS (12000, 16000) -> (60, 80) (for 90 iterations, planned for 18000)",
        "SOLVER.WARMUP_ITERS 100 -> 22 (for 90 iterations, planned for 18000)",
    ]


def test_what_the_user_gave_stays():
    given = dict(BASE_LR=1.0, MAX_ITER=7, STEPS=(3,), WARMUP_ITERS=2)
    solver, report = scale(plan(), batch=1, **given)
    assert report == []
    assert {key: solver[key] for key in given} == given


@pytest.mark.parametrize("keys", [dict(batch=-1), dict(MAX_ITER=0)])
def test_nonsense_is_refused(keys):
    with pytest.raises(ValueError, match="IMS_PER_BATCH and SOLVER.MAX_ITER are at least 1"):
        scale(plan(), **keys)


batches = st.integers(1, 512)


@settings(deadline=None)
@given(batch=batches, reference=batches, max_iter=st.integers(1, 200000), short=st.booleans())
def test_linear_rule(batch, reference, max_iter, short):
    steps = tuple(sorted({s for s in (2 * max_iter // 3, 8 * max_iter // 9) if 0 < s < max_iter}))
    planned = plan(max_iter, steps, reference)
    given = dict(MAX_ITER=max(1, max_iter // 50)) if short else {}
    solver, report = scale(planned, batch, **given)
    assert solver.BASE_LR / batch == pytest.approx(0.02 / reference)
    if not short:  # as many images, to half a batch; at least one batch
        images = planned.SOLVER.MAX_ITER * reference
        assert abs(solver.MAX_ITER * batch - images) <= max(batch / 2, batch - images)
    if len(solver.STEPS) == len(steps):
        for step, before in zip(solver.STEPS, steps, strict=True):
            assert step == pytest.approx(before * solver.MAX_ITER / max_iter, abs=1)
    changed = [key for key in ("BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS") if key not in given]
    changed = [key for key in changed if solver[key] != planned.SOLVER[key]]
    assert [line.split()[0] for line in report] == [f"SOLVER.{key}" for key in changed]


@settings(deadline=None)
@given(batch=batches, max_iter=st.integers(3, 100), total=st.integers(1, 100))
def test_detectron2_accepts_every_result(batch, max_iter, total):
    """Very short runs included: Detectron2 wants rising steps inside of the schedule."""
    planned = plan(max_iter * 10, (max_iter * 6, max_iter * 8))
    for solver in (scale(planned, batch)[0], scale(planned, batch, MAX_ITER=total)[0]):
        cfg = planned.clone()
        cfg.SOLVER = solver
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=solver.BASE_LR)
        build_lr_scheduler(cfg, optimizer)

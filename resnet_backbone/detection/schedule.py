"""Schedules that follow the batch size: the linear rule (arXiv 1706.02677, section 2.1)."""

from __future__ import annotations

from collections.abc import Collection

from detectron2.config import CfgNode


def scale_schedule(cfg: CfgNode, planned: CfgNode, given: Collection[str] = ()) -> list[str]:
    """Adapts learning rate and iterations to the batch, in place; does nothing when they agree.

    The values of ``SOLVER`` are meant for ``RESNET_BACKBONE.REFERENCE_BATCH`` images. With
    ``SOLVER.IMS_PER_BATCH`` images instead, the learning rate is multiplied by their ratio and
    ``MAX_ITER`` and ``STEPS`` are divided by it, so that as many images are seen. Steps that a very
    short schedule has no room for are left out.

    Args:
        cfg: the config of the run, not frozen.
        planned: the same without the user's overrides.
        given: keys that the user set; they stay as they are. With ``SOLVER.MAX_ITER`` given,
            the steps keep their share of the schedule.

    Returns:
        What was done, one line per key.

    Raises:
        ValueError: a batch or a schedule of less than one.
    """
    reference, batch = cfg.RESNET_BACKBONE.REFERENCE_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if min(batch, cfg.SOLVER.MAX_ITER, planned.SOLVER.MAX_ITER) < 1:
        raise ValueError("SOLVER.IMS_PER_BATCH and SOLVER.MAX_ITER are at least 1")
    ratio = batch / reference if reference > 0 else 1.0
    solver, before = cfg.SOLVER, planned.SOLVER
    if "SOLVER.MAX_ITER" not in given:
        solver.MAX_ITER = max(1, round(before.MAX_ITER / ratio))
    share = solver.MAX_ITER / before.MAX_ITER
    if "SOLVER.BASE_LR" not in given:
        solver.BASE_LR = before.BASE_LR * ratio
    if "SOLVER.STEPS" not in given and share != 1:
        steps = {round(step * share) for step in before.STEPS}
        solver.STEPS = tuple(sorted(step for step in steps if 0 < step < solver.MAX_ITER))
    if "SOLVER.WARMUP_ITERS" not in given and share != 1:
        # a shorter schedule needs no shorter warm-up
        longest = max(1, solver.MAX_ITER // 4)
        solver.WARMUP_ITERS = min(round(before.WARMUP_ITERS * max(share, 1.0)), longest)
    why = f"for {batch} images per batch, planned for {reference}"
    if ratio == 1:
        why = f"for {solver.MAX_ITER} iterations, planned for {before.MAX_ITER}"
    return [
        f"SOLVER.{key} {before[key]} -> {solver[key]} ({why})"
        for key in ("BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS")
        if f"SOLVER.{key}" not in given and solver[key] != before[key]
    ]

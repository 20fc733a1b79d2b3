"""Schedules that adapt to the batch size by the linear rule (arXiv 1706.02677, section 2.1)."""

from __future__ import annotations

from collections.abc import Collection

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from resnet_backbone.detection.checkpoint.input_check import read_key
from resnet_backbone.detection.engine.results import check_expectations
from resnet_backbone.detection.engine.writers import check_loggers
from resnet_backbone.runtime.errors import UsageError

# Names of metrics, so that a misspelled BEST_METRIC is found before training; the first are VOC's,
# the fourth is VOC's alone.
METRICS = "AP AP50 AP75 AP50-11pt APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
LEAST = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "RESNET_BACKBONE.EPOCHS": 0,
    "RESNET_BACKBONE.EARLY_STOP": 0,
}


def check_training(cfg: CfgNode) -> None:
    """Raises UsageError for training keys that are out of range or contradict each other."""
    check_expectations(cfg)
    check_loggers(cfg)
    if cfg.INPUT.get("COLOR_AUG_SSD", False):
        raise UsageError("INPUT.COLOR_AUG_SSD has no effect in train-net: set it to False")
    for key, least in LEAST.items():
        value = read_key(cfg, key)
        if value < least:
            raise UsageError(f"{key} {value}: give at least {least}")
    decay = cfg.RESNET_BACKBONE.EMA_DECAY
    if not 0 <= decay < 1:
        raise UsageError(f"RESNET_BACKBONE.EMA_DECAY {decay}: from 0 (off) to below 1, as 0.9998")
    metric, problem = cfg.RESNET_BACKBONE.BEST_METRIC, ""
    task, _, name = metric.rpartition("/")
    known = name in METRICS or name.startswith(("AP-", "AP50-"))
    if cfg.RESNET_BACKBONE.EARLY_STOP and not metric:
        problem = "EARLY_STOP needs RESNET_BACKBONE.BEST_METRIC, such as bbox/AP50"
    elif metric and cfg.TEST.EVAL_PERIOD < 1:
        problem = "BEST_METRIC needs evaluations: set TEST.EVAL_PERIOD, in iterations"
    elif metric and not task:
        problem = f"BEST_METRIC {metric}: write TASK/NAME, such as bbox/AP50"
    elif task in ("bbox", "segm") and not known:
        problem = f"BEST_METRIC {metric}: choose {task}/ and one of {', '.join(METRICS)}"
    if cfg.MODEL.META_ARCHITECTURE == "LocalizationRCNN":
        if not cfg.RESNET_BACKBONE.LOCALIZATION.PROPOSALS:
            problem = "LOCALIZATION.PROPOSALS is empty: give the run folder of an rpn_* config"
    if problem:
        raise UsageError(f"RESNET_BACKBONE.{problem}")


def check_best_metric(cfg: CfgNode) -> None:
    """Raises UsageError for a metric that the evaluation of the test sets cannot give."""
    metric, sets = cfg.RESNET_BACKBONE.BEST_METRIC, list(dict.fromkeys(cfg.DATASETS.TEST))
    form, example = "TASK/NAME", "bbox/AP50"
    if len(sets) > 1:
        form, example = f"SET/{form}", f"{sets[0]}/{example}"
    names_set = any(metric.startswith(f"{name}/") for name in sets)
    if metric and sets and names_set != (len(sets) > 1):
        raise UsageError(
            f"RESNET_BACKBONE.BEST_METRIC {metric}: with the test sets {', '.join(sets)} write "
            f"{form}, such as {example}"
        )
    of_set = next((one for one in sets if metric.startswith(f"{one}/")), "".join(sets[:1]))
    evaluator = MetadataCatalog.get(of_set).get("evaluator_type") if sets else None
    task, _, name = metric.removeprefix(f"{of_set}/").rpartition("/")
    is_voc, on = evaluator == "pascal_voc", {"segm": cfg.MODEL.MASK_ON}
    on["keypoints"] = cfg.MODEL.KEYPOINT_ON
    lacks = name in METRICS and (name not in METRICS[:4] if is_voc else name == METRICS[3])
    if metric and evaluator and (lacks or not on.get(task, True)):
        raise UsageError(f"RESNET_BACKBONE.BEST_METRIC {metric}: {of_set} is not evaluated by it")
    classes = cfg.RESNET_BACKBONE.CLASS_NAMES
    kind, dash, label = name.partition("-")
    if classes and dash and kind in ("AP", "AP50") and name not in METRICS and label not in classes:
        raise UsageError(
            f"RESNET_BACKBONE.BEST_METRIC {metric}: no class {label}; the classes are "
            f"{', '.join(classes)}"
        )


def check_early_stop(cfg: CfgNode) -> None:
    """Raises UsageError for an early stop that the run's schedule can never reach."""
    patience = cfg.RESNET_BACKBONE.EARLY_STOP
    evaluations = -(-cfg.SOLVER.MAX_ITER // max(1, cfg.TEST.EVAL_PERIOD))
    if patience >= evaluations > 0:
        raise UsageError(
            f"RESNET_BACKBONE.EARLY_STOP {patience} can never end this run: {cfg.SOLVER.MAX_ITER} "
            f"iterations have {evaluations} evaluations (TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD})"
        )


def follow_processes(cfg: CfgNode, processes: int) -> list[str]:
    """Scales the batch to the number of processes, by Detectron2's ``REFERENCE_WORLD_SIZE``.

    Works in place, and returns at most one line that says what was done. The linear rule adapts the
    rest. Periods (``TEST.EVAL_PERIOD``, ``SOLVER.CHECKPOINT_PERIOD``) do not change.
    """
    solver, node = cfg.SOLVER, cfg.RESNET_BACKBONE
    reference, solver.REFERENCE_WORLD_SIZE = solver.REFERENCE_WORLD_SIZE, 0
    if reference in (0, processes):
        return []
    before, key = solver.IMS_PER_BATCH, f"SOLVER.REFERENCE_WORLD_SIZE {reference}"
    if before % reference:
        raise UsageError(f"SOLVER.IMS_PER_BATCH {before} is not divisible by {key}")
    node.REFERENCE_BATCH = node.REFERENCE_BATCH or before
    solver.IMS_PER_BATCH = before // reference * processes
    return [
        f"SOLVER.IMS_PER_BATCH {before} x {processes} / {reference} processes = "
        f"{solver.IMS_PER_BATCH} ({key})"
    ]


def scale_schedule(
    cfg: CfgNode, planned: CfgNode, given: Collection[str] = (), num_images: int = 0
) -> list[str]:
    """Adapts learning rate and iterations to the batch, in place; returns a line for each key.

    The values of ``SOLVER`` assume batches of ``RESNET_BACKBONE.REFERENCE_BATCH`` images. For
    ``SOLVER.IMS_PER_BATCH`` images, the learning rate is multiplied by their ratio, and
    ``MAX_ITER`` and ``STEPS`` are divided by it, so that the same number of images is seen. With
    ``RESNET_BACKBONE.EPOCHS`` above 0, ``MAX_ITER`` is that many passes over the images. Steps that
    do not fit into a very short schedule are dropped.

    Args:
        cfg, planned: the config of the run, not frozen; the same without the user's overrides.
        given: keys set by the user, which are not changed. If ``SOLVER.MAX_ITER`` is given, the
            steps keep their share of the schedule, and ``EPOCHS`` in a file is ignored.
        num_images: images per epoch; needed for ``EPOCHS``.

    Raises:
        UsageError: a batch or schedule is below 1, or both ``EPOCHS`` and ``MAX_ITER`` are given.
    """
    node = cfg.RESNET_BACKBONE
    reference, batch = node.REFERENCE_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if min(batch, cfg.SOLVER.MAX_ITER, planned.SOLVER.MAX_ITER) < 1:
        raise UsageError("SOLVER.IMS_PER_BATCH and SOLVER.MAX_ITER must be at least 1")
    ratio = batch / reference if reference > 0 else 1.0
    solver, before = cfg.SOLVER, planned.SOLVER
    why = {
        "BASE_LR": f"x {batch} / {reference} images per batch",
        "MAX_ITER": f"x {reference} / {batch} images per batch",
    }
    if "SOLVER.MAX_ITER" in given:
        if node.EPOCHS and "RESNET_BACKBONE.EPOCHS" in given:
            raise UsageError("give either RESNET_BACKBONE.EPOCHS or SOLVER.MAX_ITER")
        node.EPOCHS = 0.0
    elif node.EPOCHS:
        solver.MAX_ITER = max(1, round(node.EPOCHS * num_images / batch))
        why["MAX_ITER"] = f"{node.EPOCHS:g} epochs x {num_images} images / {batch} per batch"
    else:
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
    of_length = f"SOLVER.MAX_ITER {solver.MAX_ITER}, planned {before.MAX_ITER}"
    return [
        f"SOLVER.{key} {before[key]} -> {solver[key]} ({why.get(key, of_length)})"
        for key in ("BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS")
        if f"SOLVER.{key}" not in given and solver[key] != before[key]
    ]


def plan_schedule(
    cfg: CfgNode, planned: CfgNode, given: Collection[str], num_images: int
) -> list[str]:
    """Runs :func:`scale_schedule` and checks; adds lines on the full schedule."""
    lines = scale_schedule(cfg, planned, given, num_images)
    check_best_metric(cfg)
    check_early_stop(cfg)
    solver, parts, processes = cfg.SOLVER, cfg.RESNET_BACKBONE.ACCUMULATE, comm.get_world_size()
    batch, iterations = solver.IMS_PER_BATCH, solver.MAX_ITER
    epochs = iterations * batch / num_images
    decay = solver.LR_SCHEDULER_NAME
    if decay == "WarmupMultiStepLR":
        steps = ", ".join(str(step) for step in solver.STEPS) or "no step"
        decay = f"x {solver.GAMMA:g} at {steps}"
    return [
        *lines,
        f"SOLVER.IMS_PER_BATCH {batch} = {processes} (processes) x {parts} "
        f"(RESNET_BACKBONE.ACCUMULATE) x {batch // (processes * parts)} (images at a time)",
        f"{iterations} iterations x {batch} images / {num_images} training images = "
        f"{epochs:.2f} epochs",
        f"learning rate {solver.BASE_LR:g}, warm-up {solver.WARMUP_ITERS} iterations, {decay}",
    ]

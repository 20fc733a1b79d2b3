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

# Evaluator type or RESNET_BACKBONE.TEST.METRIC -> metrics of boxes, and the one given per class
OF_VOC = ("AP", "AP50", "AP75", "AP50-11pt"), "AP50"
OF_COCO = tuple("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()), "AP"
METRICS = {
    "voc": OF_VOC,
    "pascal_voc": OF_VOC,
    "coco": OF_COCO,
    "imagenet_det": (("AP50",), "AP50"),
}
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
    if cfg.RESNET_BACKBONE.EARLY_STOP and not metric:
        problem = "EARLY_STOP needs RESNET_BACKBONE.BEST_METRIC, such as bbox/AP50"
    elif metric and cfg.TEST.EVAL_PERIOD < 1:
        problem = "BEST_METRIC needs evaluations: set TEST.EVAL_PERIOD, in iterations"
    elif metric and "/" not in metric:
        problem = f"BEST_METRIC {metric}: write TASK/NAME, such as bbox/AP50"
    if cfg.MODEL.META_ARCHITECTURE == "LocalizationRCNN":
        if not cfg.RESNET_BACKBONE.LOCALIZATION.PROPOSALS:
            problem = "LOCALIZATION.PROPOSALS is empty: give the run folder of an rpn_* config"
    if problem:
        raise UsageError(f"RESNET_BACKBONE.{problem}")


def check_best_metric(cfg: CfgNode) -> None:
    """Raises UsageError for a metric that the evaluation of the test sets does not give."""
    node, sets = cfg.RESNET_BACKBONE, list(dict.fromkeys(cfg.DATASETS.TEST))
    metric, prefixes = node.BEST_METRIC, {f"{name}/": name for name in sets}
    if len(sets) == 1:
        prefixes = {"": sets[0]}
    prefix = next((one for one in prefixes if metric.startswith(one)), None)
    key = f"RESNET_BACKBONE.BEST_METRIC {metric}"
    if not metric or not sets:
        return
    if prefix is None:
        form = f"SET/TASK/NAME, such as {sets[0]}/bbox/AP50"
        raise UsageError(f"{key}: with the test sets {', '.join(sets)} write {form}")
    kind = node.TEST.METRIC or MetadataCatalog.get(prefixes[prefix]).get("evaluator_type")
    if kind not in METRICS:  # known after the first evaluation
        return
    names, per_class = METRICS[kind]
    masks, keypoints = (kind == "coco" and on for on in (cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON))
    tasks = ["bbox", *["segm"] * masks, *["keypoints"] * keypoints]
    classes = [f"{per_class}-{name}" for name in node.CLASS_NAMES]
    task, _, name = metric.removeprefix(prefix).rpartition("/")
    is_of_a_class = name in classes if classes else name.startswith(f"{per_class}-")
    if task not in tasks or not (name in names or is_of_a_class):
        choices = ", ".join([*names, *(classes or [f"{per_class}-CLASS"])])
        raise UsageError(
            f"{key}: {prefixes[prefix]} is evaluated by {prefix}{' or '.join(tasks)}/ and one of "
            f"{choices}"
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

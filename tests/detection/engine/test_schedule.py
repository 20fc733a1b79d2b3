"""The linear rule: learning rate and iterations follow the batch."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.solver import build_lr_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_backbone.detection import add_resnet_backbone_config
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.engine import schedule


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
    report = schedule.scale_schedule(cfg, planned, [f"SOLVER.{key}" for key in given])
    return cfg.SOLVER, report


def test_published_example():
    solver, report = scale(plan(), batch=2)
    assert solver.BASE_LR == pytest.approx(0.0025)
    assert (solver.MAX_ITER, solver.STEPS) == (144000, (96000, 128000))
    assert solver.WARMUP_ITERS == 800
    assert report[0] == "SOLVER.BASE_LR 0.02 -> 0.0025 (x 2 / 16 images per batch)"
    assert len(report) == 4
    solver, _ = scale(plan(), batch=64)
    assert solver.BASE_LR == pytest.approx(0.08)
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (4500, (3000, 4000), 100)


def test_nothing_to_do():
    for planned in (plan(), plan(reference=0)):
        solver, report = scale(planned)
        assert report == [] and solver == planned.SOLVER


def test_short_run_keeps_the_shape_and_says_why():
    solver, report = scale(plan(), MAX_ITER=90)
    assert (solver.STEPS, solver.WARMUP_ITERS, solver.BASE_LR) == ((60, 80), 22, 0.02)
    assert report == [
        "SOLVER.STEPS (12000, 16000) -> (60, 80) (SOLVER.MAX_ITER 90, planned 18000)",
        "SOLVER.WARMUP_ITERS 100 -> 22 (SOLVER.MAX_ITER 90, planned 18000)",
    ]


def test_what_the_user_gave_stays():
    given = dict(BASE_LR=1.0, MAX_ITER=7, STEPS=(3,), WARMUP_ITERS=2)
    solver, report = scale(plan(), batch=1, **given)
    assert report == []
    assert {key: solver[key] for key in given} == given


def test_nonsense_is_refused():
    message = "IMS_PER_BATCH and SOLVER.MAX_ITER must be at least 1"
    for keys in (dict(batch=-1), dict(MAX_ITER=0)):
        with pytest.raises(ValueError, match=message):
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


def test_epochs():
    planned = plan(reference=16)
    cfg = planned.clone()
    cfg.SOLVER.IMS_PER_BATCH, cfg.RESNET_BACKBONE.EPOCHS = 8, 12.5
    report = schedule.plan_schedule(cfg, planned, ["SOLVER.IMS_PER_BATCH"], num_images=2400)
    assert cfg.SOLVER.MAX_ITER == 3750 and cfg.SOLVER.STEPS == (2500, 3333)
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.01)
    assert "SOLVER.MAX_ITER 18000 -> 3750 (12.5 epochs x 2400 images / 8 per batch)" in report
    assert report[-3].startswith("SOLVER.IMS_PER_BATCH 8 = 1 (processes) x 1 (RESNET_BACKBONE.ACC")
    assert report[-2] == "3750 iterations x 8 images / 2400 training images = 12.50 epochs"
    assert report[-1].endswith("iterations, x 0.1 at 2500, 3333")
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupPolyLR"
    assert schedule.plan_schedule(cfg, planned, [], 2400)[-1].endswith("iterations, WarmupPolyLR")


def test_epochs_of_a_file_and_iterations_of_the_command_line():
    planned = plan()
    planned.RESNET_BACKBONE.EPOCHS = 3.0
    cfg = planned.clone()
    cfg.SOLVER.MAX_ITER = 90
    schedule.scale_schedule(cfg, planned, ["SOLVER.MAX_ITER"], num_images=100)
    assert cfg.SOLVER.MAX_ITER == 90 and cfg.RESNET_BACKBONE.EPOCHS == 0
    cfg = planned.clone()
    given = ["SOLVER.MAX_ITER", "RESNET_BACKBONE.EPOCHS"]
    with pytest.raises(UsageError, match="either RESNET_BACKBONE.EPOCHS or SOLVER.MAX_ITER"):
        schedule.scale_schedule(cfg, planned, given, 100)


def test_augmentation_of_another_trainer_is_refused():
    cfg = plan()
    cfg.INPUT.COLOR_AUG_SSD = True
    with pytest.raises(UsageError, match="INPUT.COLOR_AUG_SSD has no effect in train-net"):
        schedule.check_training(cfg)


def test_reference_world_size():
    """Detectron2's key: the same numbers as its auto_scale_workers."""
    for processes in (1, 4, 8, 16):
        planned = plan(reference=0)
        planned.SOLVER.REFERENCE_WORLD_SIZE = 8
        theirs = DefaultTrainer.auto_scale_workers(planned, processes).SOLVER
        cfg = planned.clone()
        report = schedule.follow_processes(cfg, processes)
        schedule.scale_schedule(cfg, planned)
        assert len(report) == (processes != 8)
        for key in ("IMS_PER_BATCH", "MAX_ITER", "STEPS"):
            assert cfg.SOLVER[key] == theirs[key], key
        assert cfg.SOLVER.BASE_LR == pytest.approx(theirs.BASE_LR)


@pytest.mark.parametrize(
    "key, value, period, message",
    [
        ("EARLY_STOP", 2, 0, "EARLY_STOP needs RESNET_BACKBONE.BEST_METRIC"),
        ("BEST_METRIC", "bbox/AP50", 0, "set TEST.EVAL_PERIOD"),
        ("BEST_METRIC", "AP", 5, "AP: write TASK/NAME"),
        ("EMA_DECAY", 1.0, 0, "EMA_DECAY 1.0: from 0 .off. to below 1"),
        ("EPOCHS", -1.0, 0, "EPOCHS -1.0: give at least 0"),
    ],
)
def test_contradictions(make_cfg, key, value, period, message):
    keys = {f"RESNET_BACKBONE__{key}": value, "TEST__EVAL_PERIOD": period}
    cfg = make_cfg(**keys, DATASETS__TEST=("a",), RESNET_BACKBONE__CLASS_NAMES=["cat", "dog"])
    with pytest.raises(UsageError, match=message):
        schedule.check_training(cfg)
        schedule.check_best_metric(cfg)


def test_metrics_of_several_test_sets(make_cfg):
    cfg = make_cfg(DATASETS__TEST=("a", "b"), RESNET_BACKBONE__CLASS_NAMES=["cat", "dog"])
    for metric in ("", "a/bbox/AP50", "b/bbox/AP50-11pt", "b/bbox/AP-dog", "a/sem_seg/mIoU"):
        cfg.RESNET_BACKBONE.BEST_METRIC = metric
        schedule.check_best_metric(cfg)
    for metric in ("bbox/AP50", "c/bbox/AP50"):
        cfg.RESNET_BACKBONE.BEST_METRIC = metric
        with pytest.raises(UsageError, match="sets a, b write SET/TASK/NAME, such as a/bbox/AP50"):
            schedule.check_best_metric(cfg)


OF_VOC = "by bbox/ and one of AP, AP50, AP75, AP50-11pt, AP50-cat, AP50-dog$"


@pytest.mark.parametrize(
    "kind, metric, message",
    [
        ("pascal_voc", "bbox/AP50-11pt", ""),
        ("pascal_voc", "bbox/AP50-dog", ""),
        ("pascal_voc", "bbox/APs", OF_VOC),
        ("pascal_voc", "bbox/AP-dog", OF_VOC),
        ("pascal_voc", "bbox/AP5O", OF_VOC),
        ("pascal_voc", "bbox/AP50-catt", OF_VOC),
        ("pascal_voc", "metrics_of_pascal_voc/bbox/AP50", OF_VOC),
        ("coco", "bbox/APs", ""),
        ("coco", "segm/AP-dog", ""),
        ("coco", "bbox/AP50-11pt", "by bbox or segm/ and one of AP, AP50"),
        ("coco", "keypoints/AP", "by bbox or segm/"),
        ("sem_seg", "sem_seg/mIoU", ""),
    ],
)
def test_metrics_that_an_evaluation_gives(make_cfg, kind, metric, message):
    name = f"metrics_of_{kind}"
    MetadataCatalog.get(name).evaluator_type = kind
    cfg = make_cfg(DATASETS__TEST=(name,), RESNET_BACKBONE__CLASS_NAMES=["cat", "dog"])
    cfg.MODEL.MASK_ON, cfg.RESNET_BACKBONE.BEST_METRIC = True, metric
    if not message:
        return schedule.check_best_metric(cfg)
    with pytest.raises(UsageError, match=f"{metric}: {name} is evaluated {message}"):
        schedule.check_best_metric(cfg)


def test_early_stop_that_can_never_come(make_cfg):
    best = dict(RESNET_BACKBONE__BEST_METRIC="coco/bbox/AP", TEST__EVAL_PERIOD=10)
    cfg = make_cfg(SOLVER__MAX_ITER=35, RESNET_BACKBONE__EARLY_STOP=3, **best)
    schedule.check_training(cfg), schedule.check_early_stop(cfg)
    cfg.SOLVER.MAX_ITER = 30
    with pytest.raises(UsageError, match="3 can never end this run: 30 iterations have 3 eval"):
        schedule.check_early_stop(cfg)

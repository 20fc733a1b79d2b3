"""One step: parts of a batch, mixed precision, numbers that are not finite."""

import copy
import itertools
import math
import multiprocessing
import os
import subprocess
import time

import pytest
import torch
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import rpn
from detectron2.modeling.roi_heads import roi_heads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from runs import Linear, number_loader
from torch import nn

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.data.sampling import BatchPlan
from resnet_backbone.detection.engine.step import TrainStep
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.references import losses_of
from resnet_backbone.models import FrozenBatchNorm2d
from resnet_backbone.runtime.errors import TrainingDiverged
from resnet_backbone.runtime.evaluation import moving_average
from resnet_backbone.runtime.signals import StopRequest


def take_first(labels, num_samples, positive_fraction, bg_label):
    """Detectron2's subsample_labels without chance."""
    positive = torch.nonzero((labels != -1) & (labels != bg_label)).squeeze(1)
    negative = torch.nonzero(labels == bg_label).squeeze(1)
    count = min(len(positive), int(num_samples * positive_fraction))
    return positive[:count], negative[: num_samples - count]


def fixed_proposals(proposals, logits, sizes, *options):
    """In place of those that the network likes best, which rounding can change."""
    found = []
    for height, width in sizes:
        corners = torch.tensor([[x, y] for x in range(0, width - 40, 8) for y in (0, 12, 20)])
        boxes = torch.cat([corners, corners + torch.tensor([36, 44])], 1).float()
        fields = dict(proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes)))
        found.append(Instances((height, width), **fields))
    return found


class Parts:
    """A loader of fixed parts."""

    def __init__(self, images, accumulate):
        self.plan = BatchPlan(len(images), accumulate)
        self.seed = 1
        size = self.plan.part
        self.parts = [images[first : first + size] for first in range(0, len(images), size)]

    def start(self, iteration):
        while True:
            yield from self.parts


@pytest.fixture
def cfg(make_cfg, small):
    small |= dict(MODEL__RPN__BATCH_SIZE_PER_IMAGE=16, MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=8)
    small |= dict(MODEL__RPN__PRE_NMS_TOPK_TRAIN=200, MODEL__RPN__POST_NMS_TOPK_TRAIN=100)
    keys = dict(MODEL__WEIGHTS="", MODEL__RESNETS__NORM="FrozenBN", MODEL__BACKBONE__FREEZE_AT=0)
    keys |= dict(MODEL__FPN__NORM="", MODEL__ROI_HEADS__NUM_CLASSES=2, SOLVER__AMP__ENABLED=False)
    return make_cfg("quickstart/faster_rcnn_R_18_FPN.yaml", **small, **keys)


@pytest.fixture
def gradients(cfg, monkeypatch):
    """Function (images, accumulate, amp) -> gradients by name of the tool's step."""
    monkeypatch.setattr(rpn, "subsample_labels", take_first)
    monkeypatch.setattr(rpn, "find_top_rpn_proposals", fixed_proposals)
    monkeypatch.setattr(roi_heads, "subsample_labels", take_first)
    torch.manual_seed(0)
    model = build_model(cfg).double()

    def compute(images, accumulate, amp=False):
        cfg.SOLVER.AMP.ENABLED = amp
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        stepper = TrainStep(cfg, model, Parts(images, accumulate), optimizer, StopRequest())
        with EventStorage():
            report = stepper.run(0)
        assert report.stop == "" and math.isfinite(sum(report.losses.values()))
        return {name: p.grad.clone() for name, p in model.named_parameters()}, report.losses

    compute.model = model
    return compute


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_parts_give_the_gradients_of_the_whole_batch(gradients, make_images, accumulate):
    images, model = make_images(*[(64, 96)] * 4), gradients.model
    found, means = gradients(images, accumulate)
    model.zero_grad()
    losses = losses_of(model, images)  # by hand: forward, sum, backward
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert means[name] == pytest.approx(loss.item(), rel=1e-5)
    assert sum(bool(parameter.grad.any()) for parameter in model.parameters()) > 20
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max()
        assert (found[name] - parameter.grad).abs().max() <= 1e-5 * largest, name


def test_bf16_takes_the_same_path(gradients, make_images):
    images = make_images((64, 96), (64, 96))
    gradients.model.float()
    exact, losses = gradients(images, 2)
    found, rounded = gradients(images, 2, amp=True)
    assert all(rounded[name] == pytest.approx(losses[name], rel=0.1) for name in losses)
    assert any((found[name] != exact[name]).any() for name in exact)
    weight = "roi_heads.box_predictor.cls_score.weight"
    assert torch.nn.functional.cosine_similarity(found[weight], exact[weight]).min() > 0.9


def step_of(cfg, loader, stop=None):
    """A step of :class:`Linear` by SGD with rate 1."""
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return TrainStep(cfg, model, loader, optimizer, stop or StopRequest())


def test_update_and_seeds_by_hand(cfg):
    images = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])]
    first, again, later = (step_of(cfg, Parts(images, 2)) for _ in range(3))
    report = first.run(0)
    assert first.model.weight.tolist() == [1 - 2, 1 - 1] and report.losses == {"loss": 3.0}
    again.run(0), later.run(1)
    assert again.model.drawn == first.model.drawn and len(set(first.model.drawn)) == 2
    assert not set(later.model.drawn) & set(first.model.drawn)


def test_sgd_is_fused_on_cpus_and_updates_as_without(cfg):
    found = []
    for makes_fused in (True, False):
        stepper = step_of(cfg, Parts([torch.tensor([1.0, 2.0])], 1))
        group = stepper.optimizer.param_groups[0]
        assert group["fused"] and not group["foreach"]
        group |= dict(lr=0.1, momentum=0.9, weight_decay=0.01)
        state = stepper.state_dict()
        state["optimizer"]["param_groups"][0] |= dict(fused=None, foreach=True)
        stepper.load_state_dict(state)  # written by an earlier version or on a GPU
        group = stepper.optimizer.param_groups[0]
        assert group["fused"] and group["momentum"] == 0.9
        if not makes_fused:
            group |= dict(fused=False, foreach=True)
        for iteration in range(3):
            stepper.run(iteration)
        found.append(stepper.model.weight.detach())
    torch.testing.assert_close(*found)


def test_another_number_of_training_images_is_refused(cfg):
    first, resumed = (step_of(cfg, number_loader(count, 2)) for count in (6, 5))
    state = first.state_dict()
    first.load_state_dict(state)
    with pytest.raises(UsageError, match="began with 6 training images, but now has 5: restore"):
        resumed.load_state_dict(state)


def test_the_moving_normalizer_of_retinanet_is_part_of_the_state(cfg):
    """Detectron2 keeps it as a plain number, which no state dict has."""
    first, resumed = (step_of(cfg, Parts([torch.ones(2)], 1)) for _ in range(2))
    assert "loss_normalizer" not in first.state_dict()
    first.network.loss_normalizer = 113.5
    resumed.load_state_dict(first.state_dict())
    assert resumed.network.loss_normalizer == 113.5


def test_averaged_weights_by_hand(cfg):
    cfg.RESNET_BACKBONE.EMA_DECAY = 0.2  # the second update is still in the warm-up
    image, average = torch.tensor([1.0, 2.0]), 0
    stepper = step_of(cfg, Parts([image], 1))
    for iteration, decay in enumerate((0, 2 / 11, 0.2)):
        stepper.run(iteration)
        weight = torch.ones(2) - (iteration + 1) * image
        average = decay * average + (1 - decay) * weight
        torch.testing.assert_close(stepper.evaluated_model.weight.data, average)
        assert torch.equal(stepper.network.weight, weight)


def test_constants_are_averaged_to_the_bit():
    model = FrozenBatchNorm2d(99)
    for value in model.buffers():
        value.uniform_(0, 3)
    average, before = moving_average(model, 0.9), copy.deepcopy(model.state_dict())
    for _ in range(20):
        average.update_parameters(model)
    after = average.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_of_ones_own(cfg, accumulate):
    """An iterable over lists, such as Detectron2's build_detection_train_loader gives."""
    cfg.SOLVER.IMS_PER_BATCH, cfg.RESNET_BACKBONE.ACCUMULATE, cfg.SEED = 2, accumulate, 1
    batches = [[torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])], [torch.ones(2)] * 2]
    stepper = step_of(cfg, batches)
    model = stepper.model
    assert stepper.data_loader is batches
    stepper.run(0)
    assert model.weight.tolist() == [1 - 2, 1 - 1]
    stepper.run(1)
    assert model.weight.tolist() == [-1 - 1, 0 - 1]
    assert len(set(model.drawn)) == 2 * accumulate


def test_a_loader_whose_batches_do_not_divide(cfg):
    cfg.SOLVER.IMS_PER_BATCH, cfg.RESNET_BACKBONE.ACCUMULATE = 2, 2
    with pytest.raises(UsageError, match="gave 3 images, which do not divide into 2 parts"):
        step_of(cfg, [[torch.ones(2)] * 3]).run(0)


def test_workers_that_a_signal_ends(cfg):
    """Nothing is raised in the middle of a step, and the next one has its images."""
    loader, seen = number_loader(8, 1, workers=1), []
    with StopRequest() as stop:
        stepper = step_of(cfg, loader, stop)
        stepper.model.register_forward_pre_hook(lambda _, given: seen.append(torch.stack(given[0])))
        stepper.run(0)
        (worker,) = multiprocessing.active_children()
        # from another process: PyTorch's workers end quietly when their parent tells them to
        subprocess.run(["kill", "-TERM", str(worker.pid), str(os.getpid())], check=True)
        while worker.is_alive() or not stop.name:
            time.sleep(0.01)
        time.sleep(0.1)
        assert stepper.run(1).stop == "SIGTERM" and stepper.run(2).stop == "SIGTERM"
    wanted = [torch.stack(part) for part in itertools.islice(loader.start(0), 3)]
    assert torch.equal(torch.cat(seen), torch.cat(wanted))


@pytest.mark.parametrize("bad", [torch.tensor([math.nan, 0.0]), "diverged"])
@pytest.mark.parametrize("place", [0, 1])
def test_not_finite(cfg, bad, place):
    images = [torch.ones(2), torch.ones(2)]
    images[place] = bad
    stepper = step_of(cfg, Parts(images, 2))
    with pytest.raises(TrainingDiverged, match="loss nan|Predicted boxes or scores") as caught:
        stepper.run(0)
    assert "\n" not in str(caught.value)
    assert stepper.model.weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("activation", ["relu", "prelu"])
def test_slopes_of_prelu_are_not_decayed(make_family, activation):
    keys = dict(MODEL__RESNETS__NORM="BN", MODEL__BACKBONE__FREEZE_AT=0)
    cfg = make_family("FPN", RESNET_BACKBONE__ACTIVATION=activation, **keys)
    model = build_model(cfg)
    slopes = {id(m.weight) for m in model.modules() if isinstance(m, nn.PReLU)}
    ours, theirs = (
        {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (kind.build_optimizer(cfg, model) for kind in (Trainer, DefaultTrainer))
    )
    assert ours == {key: 0 if key in slopes else value for key, value in theirs.items()}
    assert bool(slopes) == (activation == "prelu") and all(theirs[key] for key in slopes)

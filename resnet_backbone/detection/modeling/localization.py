"""Localization of the class that an image shows (paper, appendix C): proposals and R-CNN per class.

Both networks are Detectron2 meta-architectures, trained by ``train-net`` from the configs in
``configs/detection/imagenet_loc``. Of every class they give one box with its score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_anchor_generator,
    build_backbone,
    build_model,
    detector_postprocess,
)
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from resnet_backbone.detection.config import UsageError, backbone_node, with_keys
from resnet_backbone.detection.evaluation.imagenet import read_guesses

PRIOR = 0.01  # first probability of every class, so that a thousand of them do not drown the loss
CHUNK = 64  # regions that go through the network at once in testing


class _Localizer(nn.Module):
    """Input, and the loss of one binary classifier and one box for each class."""

    def __init__(self, num_classes: int, pixel_mean, pixel_std, box_weights: Sequence[float]):
        super().__init__()
        self.num_classes = num_classes
        self.transform = Box2BoxTransform(weights=box_weights)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def normalize(self, image: Tensor) -> Tensor:
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std

    def losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        boxes: Tensor,
        target_boxes: Tensor,
        classes: Tensor,
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of all classes, and smooth L1 of the true class's box.

        Args:
            logits: (S, C) of the sampled boxes.
            deltas: (S, C, 4).
            boxes, target_boxes: (S, 4), what is moved and where to.
            classes: int64 (S,), the true class or, for background, C.
        """
        positive = classes < self.num_classes
        wanted = F.one_hot(classes, self.num_classes + 1)[:, :-1].to(logits)
        total = max(1, len(classes))
        loss_cls = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / total
        moved = deltas[positive, classes[positive]]
        goal = self.transform.get_deltas(boxes[positive], target_boxes[positive])
        loss_box = F.smooth_l1_loss(moved, goal, beta=1 / 9, reduction="sum") / total
        return {"loss_loc_cls": loss_cls, "loss_loc_box": loss_box}


@META_ARCH_REGISTRY.register()
class ClassProposalNetwork(_Localizer):
    """A region proposal network whose objectness and boxes are of one class each.

    A 3x3 convolution on the classifier's last stage, then two sibling 1x1 convolutions: ``cls``
    with C binary logistic outputs, ``reg`` with C x 4 numbers, for each anchor. Of each image
    ``MODEL.RPN.BATCH_SIZE_PER_IMAGE`` anchors are trained on, the paper's eight, up to half of
    them positive.

    Tested on the center crop (``RESNET_BACKBONE.LOCALIZATION.CENTER_CROP`` pixels), or on the
    whole image where that is 0, fully convolutionally at each of
    ``RESNET_BACKBONE.LOCALIZATION.SCALES``, whose best boxes compete.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        feature: str,
        anchor_generator: nn.Module,
        matcher: Matcher,
        num_classes: int,
        hidden: int,
        sampled: int,
        positive_fraction: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        box_weights: Sequence[float],
        center_crop: int,
        scales: Sequence[int],
    ):
        super().__init__(num_classes, pixel_mean, pixel_std, box_weights)
        self.backbone, self.feature = backbone, feature
        self.anchor_generator, self.matcher = anchor_generator, matcher
        self.sampled, self.positive_fraction = sampled, positive_fraction
        self.center_crop, self.scales = center_crop, tuple(scales)
        self.num_anchors = anchor_generator.num_anchors[0]
        width = backbone.output_shape()[feature].channels
        self.conv = nn.Conv2d(width, hidden, 3, padding=1)
        self.cls = nn.Conv2d(hidden, self.num_anchors * num_classes, 1)
        self.reg = nn.Conv2d(hidden, self.num_anchors * num_classes * 4, 1)
        for layer in (self.conv, self.cls, self.reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.cls.bias, math.log(PRIOR / (1 - PRIOR)))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone, node = build_backbone(cfg), backbone_node(cfg).LOCALIZATION
        (feature,) = cfg.MODEL.RPN.IN_FEATURES
        shape = backbone.output_shape()[feature]
        rpn = cfg.MODEL.RPN
        return {
            "backbone": backbone,
            "feature": feature,
            "anchor_generator": build_anchor_generator(cfg, [shape]),
            "matcher": Matcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True),
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "hidden": node.WIDTH,
            "sampled": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "box_weights": rpn.BBOX_REG_WEIGHTS,
            "center_crop": node.CENTER_CROP,
            "scales": node.SCALES,
        }

    def forward(self, inputs: list[dict]) -> Any:
        """Losses in training, else {"instances": one box of each class} of each image."""
        if not self.training:
            return [self._detect(image) for image in inputs]
        images = ImageList.from_tensors([self.normalize(image["image"]) for image in inputs])
        logits, deltas, anchors = self.predict(images.tensor)
        rows, columns, boxes, goals, classes = [], [], [], [], []
        for number, image in enumerate(inputs):
            chosen, goal, kind = self.sample(anchors, image["instances"].to(self.device))
            rows.append(torch.full_like(chosen, number))
            columns.append(chosen)
            boxes.append(anchors[chosen])
            goals.append(goal)
            classes.append(kind)
        places = torch.cat(rows), torch.cat(columns)
        found = map(torch.cat, (boxes, goals, classes))
        return self.losses(logits[places], deltas[places], *found)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized images (N, 3, H, W) -> logits (N, R, C), deltas (N, R, C, 4), anchors (R, 4).

        R is positions times anchors.
        """
        features = self.backbone(images)[self.feature]
        hidden = F.relu(self.conv(features))
        count, (height, width) = len(images), hidden.shape[-2:]
        shape = (count, self.num_anchors, self.num_classes)
        logits = self.cls(hidden).view(*shape, height, width).permute(0, 3, 4, 1, 2)
        deltas = self.reg(hidden).view(*shape, 4, height, width).permute(0, 4, 5, 1, 2, 3)
        (anchors,) = self.anchor_generator([features])
        return logits.flatten(1, 3).float(), deltas.flatten(1, 3).float(), anchors.tensor

    def sample(self, anchors: Tensor, objects: Instances) -> tuple[Tensor, Tensor, Tensor]:
        """Which anchors of an image are trained on, where they should be, and their classes.

        Background's class is C. All anchors of a crop without objects are background.
        """
        boxes, classes = objects.gt_boxes.tensor, objects.gt_classes
        if not len(boxes):
            chosen = torch.randperm(len(anchors), device=self.device)[: self.sampled]
            return chosen, anchors[chosen], torch.full_like(chosen, self.num_classes)
        matches, labels = self.matcher(pairwise_iou(Boxes(boxes), Boxes(anchors)))
        parts = subsample_labels(labels.long(), self.sampled, self.positive_fraction, 0)
        chosen = torch.cat(parts)
        kinds = classes[matches[chosen]]
        kinds[len(parts[0]) :] = self.num_classes
        return chosen, boxes[matches[chosen]], kinds

    def proposals(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Of an image (3, H, W), 0..255: logits (K, R) of some classes (K,), boxes (K, R, 4).

        Boxes are in pixels of the image and end at its edges, or at those of the center crop.
        """
        height, width = image.shape[-2:]
        found = []
        for view, scale, x, y in self._views(image):
            logits, deltas, anchors = self.predict(view[None])
            logits, deltas = logits[0, :, classes].T, deltas[0, :, classes].transpose(0, 1)
            count = len(anchors)
            boxes = self.transform.apply_deltas(
                deltas.reshape(-1, 4), anchors.repeat(len(classes), 1)
            ).view(len(classes), count, 4)
            high, wide = view.shape[-2:]
            limit = boxes.new_tensor([wide, high, wide, high])
            boxes = torch.minimum(boxes.clamp(min=0), limit) / scale
            found.append((logits, boxes + boxes.new_tensor([x, y, x, y])))
        logits, boxes = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        limit = boxes.new_tensor([width, height, width, height])
        return logits, torch.minimum(boxes, limit)

    def _views(self, image: Tensor) -> list[tuple[Tensor, Tensor, int, int]]:
        """What is looked at: normalized images, their scale (4,), where they begin in the image."""
        image = self.normalize(image)
        height, width = image.shape[-2:]
        one = image.new_ones(4)
        if self.center_crop:
            high, wide = (min(self.center_crop, side) for side in (height, width))
            y, x = (height - high) // 2, (width - wide) // 2
            return [(image[:, y : y + high, x : x + wide], one, x, y)]
        views = []
        for short in self.scales or [min(height, width)]:
            ratio = short / min(height, width)
            size = [max(1, round(side * ratio)) for side in (height, width)]
            view = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
            scale = image.new_tensor([size[1] / width, size[0] / height] * 2)
            views.append((view, scale, 0, 0))
        return views

    def _detect(self, image: dict) -> dict[str, Instances]:
        classes = torch.arange(self.num_classes, device=self.device)
        logits, boxes = self.proposals(image["image"], classes)
        scores, best = logits.sigmoid().max(dim=1)
        return _as_output(image, boxes[classes, best], scores, classes)


def _as_output(image: dict, boxes: Tensor, scores: Tensor, classes: Tensor) -> dict[str, Instances]:
    """Detections in the size of the original image, as ``GeneralizedRCNN`` gives them."""
    size = tuple(image["image"].shape[-2:])
    found = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    original = image.get("height", size[0]), image.get("width", size[1])
    return {"instances": detector_postprocess(found, *original)}


@META_ARCH_REGISTRY.register()
class LocalizationRCNN(_Localizer):
    """R-CNN on the proposals of one class: each warped to a square, two sibling layers per class.

    The proposals are those of a trained :class:`ClassProposalNetwork`, which stays as it is
    (``RESNET_BACKBONE.LOCALIZATION.PROPOSALS``, a run folder; it becomes part of the weights). Of
    the true class the ``MODEL.RPN.POST_NMS_TOPK_TRAIN`` best and the objects are sampled in
    training. In testing the paper's 200 best of each class are scored and moved.
    """

    @configurable
    def __init__(
        self,
        *,
        proposer: ClassProposalNetwork,
        backbone: Backbone,
        feature: str,
        num_classes: int,
        matcher: Matcher,
        sampled: int,
        positive_fraction: float,
        topk: tuple[int, int],
        nms_threshold: float,
        region_size: int,
        guesses: Mapping[str, Sequence[int]],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        box_weights: Sequence[float],
    ):
        super().__init__(num_classes, pixel_mean, pixel_std, box_weights)
        self.proposer = proposer.requires_grad_(False).eval()
        self.backbone, self.feature, self.matcher = backbone, feature, matcher
        self.sampled, self.positive_fraction = sampled, positive_fraction
        self.topk, self.nms_threshold, self.region_size = topk, nms_threshold, region_size
        self.guesses = guesses
        width = backbone.output_shape()[feature].channels
        self.cls = nn.Linear(width, num_classes)
        self.reg = nn.Linear(width, num_classes * 4)
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.reg.weight, std=0.001)
        nn.init.constant_(self.cls.bias, math.log(PRIOR / (1 - PRIOR)))
        nn.init.zeros_(self.reg.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node, heads = backbone_node(cfg).LOCALIZATION, cfg.MODEL.ROI_HEADS
        backbone = build_backbone(cfg)
        (feature,) = heads.IN_FEATURES
        return {
            "proposer": build_proposer(cfg),
            "backbone": backbone,
            "feature": feature,
            "num_classes": heads.NUM_CLASSES,
            "matcher": Matcher(heads.IOU_THRESHOLDS, heads.IOU_LABELS),
            "sampled": heads.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": heads.POSITIVE_FRACTION,
            "topk": (cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST),
            "nms_threshold": cfg.MODEL.RPN.NMS_THRESH,
            "region_size": node.REGION_SIZE,
            "guesses": read_guesses(node.GUESSES, backbone_node(cfg).CLASS_NAMES),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "box_weights": cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS,
        }

    def train(self, mode: bool = True) -> LocalizationRCNN:
        super().train(mode)
        self.proposer.eval()
        return self

    def forward(self, inputs: list[dict]) -> Any:
        """Losses in training, else {"instances": one box of each class} of each image.

        In testing only the classes in an input's ``image_classes`` and those guessed for its
        ``file_name`` are looked for; all of them where there are none.
        """
        if not self.training:
            return [self._detect(image) for image in inputs]
        crops, boxes, goals, classes = [], [], [], []
        for image in inputs:
            objects = image["instances"].to(self.device)
            regions, goal, kind = self.sample(image["image"], objects)
            crops.append(self.warp(image["image"], regions))
            boxes.append(regions)
            goals.append(goal)
            classes.append(kind)
        logits, deltas = self.predict(torch.cat(crops))
        return self.losses(logits, deltas, *map(torch.cat, (boxes, goals, classes)))

    @torch.no_grad()
    def propose(self, image: Tensor, classes: Tensor, count: int) -> list[Tensor]:
        """The best proposals (Ri, 4) of each class (K,), at most ``count``, after NMS."""
        logits, boxes = self.proposer.proposals(image, classes)
        pairs = zip(logits, boxes, strict=True)
        return [own[nms(own, score, self.nms_threshold)[:count]] for score, own in pairs]

    def sample(self, image: Tensor, objects: Instances) -> tuple[Tensor, Tensor, Tensor]:
        """Regions (S, 4) of an image to train on, their objects' boxes, and their classes."""
        boxes, classes = objects.gt_boxes.tensor, objects.gt_classes
        if not len(boxes):
            raise UsageError("localization needs images with at least one object in training")
        (regions,) = self.propose(image, classes[:1], self.topk[0])
        regions = torch.cat([regions, boxes])
        matches, labels = self.matcher(pairwise_iou(Boxes(boxes), Boxes(regions)))
        kinds = torch.where(labels == 1, classes[matches], self.num_classes)
        kinds[labels == -1] = -1
        parts = subsample_labels(kinds, self.sampled, self.positive_fraction, self.num_classes)
        chosen = torch.cat(parts)
        return regions[chosen], boxes[matches[chosen]], kinds[chosen]

    def warp(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Each region (R, 4) of an image as a normalized square (R, 3, size, size)."""
        size, image = self.region_size, self.normalize(image)[None]
        return roi_align(image, [boxes.float()], size, sampling_ratio=2, aligned=True)

    def predict(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (R, 3, size, size) -> logits (R, C), deltas (R, C, 4)."""
        features = self.backbone(crops)[self.feature].mean((2, 3))
        deltas = self.reg(features).view(len(crops), self.num_classes, 4)
        return self.cls(features).float(), deltas.float()

    def _detect(self, image: dict) -> dict[str, Instances]:
        guessed = self.guesses.get(Path(image.get("file_name", "")).stem, ())
        wanted = dict.fromkeys([*image.get("image_classes", ()), *guessed])
        classes = torch.tensor(list(wanted or range(self.num_classes)), device=self.device)
        proposals = self.propose(image["image"], classes, self.topk[1])
        height, width = image["image"].shape[-2:]
        found = []
        for number, boxes in zip(classes.tolist(), proposals, strict=True):
            parts = [self.predict(self.warp(image["image"], part)) for part in boxes.split(CHUNK)]
            logits, deltas = (torch.cat(part)[:, number] for part in zip(*parts, strict=True))
            score, best = logits.sigmoid().max(dim=0)
            moved = Boxes(self.transform.apply_deltas(deltas[best][None], boxes[best][None]))
            moved.clip((height, width))
            found.append((moved.tensor, score[None]))
        boxes, scores = (torch.cat(part) for part in zip(*found, strict=True))
        return _as_output(image, boxes, scores, classes)


def build_proposer(cfg: CfgNode) -> ClassProposalNetwork:
    """The network of ``RESNET_BACKBONE.LOCALIZATION.PROPOSALS`` with its weights.

    Where that is empty, the same network without weights, for an evaluation whose
    ``MODEL.WEIGHTS`` bring them.
    """
    folder = backbone_node(cfg).LOCALIZATION.PROPOSALS
    network = build_model(with_keys(cfg, "MODEL.META_ARCHITECTURE", ClassProposalNetwork.__name__))
    if not folder:
        return network
    path = Path(folder, "model_final.pth")
    if not path.is_file():
        raise UsageError(
            f"RESNET_BACKBONE.LOCALIZATION.PROPOSALS {folder}: no model_final.pth there; give the "
            "run folder of a finished ClassProposalNetwork"
        )
    tensors = torch.load(path, map_location="cpu", weights_only=True)["model"]
    unlike = network.load_state_dict(tensors, strict=False)
    if unlike.missing_keys:
        raise UsageError(f"{path} is of another network: it has no {unlike.missing_keys[0]}")
    return network

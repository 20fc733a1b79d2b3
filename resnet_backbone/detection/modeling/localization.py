"""ImageNet localization (paper, appendix C): proposals and R-CNN per class.

Both networks are Detectron2 meta-architectures, trained by ``train-net`` from the configs in
``configs/detection/imagenet_loc``. They predict one box with its score for every class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_anchor_generator,
    build_backbone,
    detector_postprocess,
)
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from resnet_backbone.detection.config import UsageError, backbone_node
from resnet_backbone.detection.evaluation.imagenet import read_guesses

PRIOR = 0.01  # initial probability of each class, so that 1,000 classes do not dominate the loss
SHORT_SIDE = 256  # pixels, of the images that proposals are made on, without SCALES
CHUNK = 64  # regions per forward pass in testing


class _Localizer(nn.Module):
    """Base class: input, sampling of boxes, and the loss of one classifier and box per class."""

    def __init__(
        self,
        backbone: Backbone,
        feature: str,
        num_classes: int,
        matcher: Matcher,
        sampled: int,
        positive_fraction: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        box_weights: Sequence[float],
    ):
        super().__init__()
        self.backbone, self.feature = backbone, feature
        self.num_classes, self.matcher = num_classes, matcher
        self.sampled, self.positive_fraction = sampled, positive_fraction
        self.transform = Box2BoxTransform(weights=box_weights)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @staticmethod
    def read_config(cfg: CfgNode, part: CfgNode) -> dict[str, Any]:
        """Returns the arguments; `part`, MODEL.RPN or MODEL.ROI_HEADS, configures sampling."""
        (feature,) = part.IN_FEATURES
        return {
            "backbone": build_backbone(cfg),
            "feature": feature,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "sampled": part.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": part.POSITIVE_FRACTION,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def init_layers(self, **std: float) -> None:
        for name, value in std.items():
            layer = getattr(self, name)
            nn.init.normal_(layer.weight, std=value)
            nn.init.constant_(layer.bias, math.log(PRIOR / (1 - PRIOR)) if name == "cls" else 0)

    def normalize(self, image: Tensor) -> Tensor:
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std

    def forward(self, inputs: list[dict]) -> Any:
        """Returns losses in training, else {"instances": one box per class} for each image."""
        if self.training:
            return self.losses(*self.predict_sampled(inputs))
        outputs = []
        for image in inputs:
            height, width = image["image"].shape[-2:]
            boxes, scores, classes = self.detect(image)
            fields = dict(pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            size = image.get("height", height), image.get("width", width)
            found = detector_postprocess(Instances((height, width), **fields), *size)
            outputs.append({"instances": found})
        return outputs

    def sample(self, boxes: Tensor, objects: Instances) -> tuple[Tensor, ...]:
        """Samples boxes (R, 4) of an image: rows (S,), boxes, target boxes (S, 4), classes (S,).

        The class of the background is C. In a crop without objects all boxes are background.
        """
        goals, classes = objects.gt_boxes.tensor, objects.gt_classes
        matches, labels = self.matcher(pairwise_iou(objects.gt_boxes, Boxes(boxes)))
        goals, classes = F.pad(goals, (0, 0, 0, 1)), F.pad(classes, (0, 1))  # in case of no objects
        kinds = torch.where(labels == 1, classes[matches], self.num_classes)
        kinds[labels == -1] = -1  # ignored
        parts = subsample_labels(kinds, self.sampled, self.positive_fraction, self.num_classes)
        rows = torch.cat(parts)
        return rows, boxes[rows], goals[matches[rows]], kinds[rows]

    def losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, goals: Tensor, classes: Tensor
    ) -> dict[str, Tensor]:
        """Returns binary cross-entropy of all classes and smooth L1 of the true class's box.

        Logits (S, C) and deltas (S, C, 4) are of sampled boxes, the rest is from :meth:`sample`.
        """
        positive = classes < self.num_classes
        wanted = F.one_hot(classes, self.num_classes + 1)[:, :-1].to(logits)
        total = max(1, len(classes))
        loss_cls = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / total
        moved = deltas[positive, classes[positive]]
        wanted = self.transform.get_deltas(boxes[positive], goals[positive])
        loss_box = F.smooth_l1_loss(moved, wanted, beta=1 / 9, reduction="sum") / total
        return {"loss_loc_cls": loss_cls, "loss_loc_box": loss_box}


@META_ARCH_REGISTRY.register()
class ClassProposalNetwork(_Localizer):
    """A region proposal network with per-class objectness and boxes.

    A 3x3 convolution on the classifier's last stage, then two sibling 1x1 convolutions: for each
    anchor, ``cls`` has C binary logistic outputs and ``reg`` C x 4 numbers. Each image contributes
    ``MODEL.RPN.BATCH_SIZE_PER_IMAGE`` anchors to the loss (8 in the paper), up to half of them
    positive.

    Tests use the center crop (``RESNET_BACKBONE.LOCALIZATION.CENTER_CROP`` pixels) or, where that
    is 0, the whole image fully convolutionally: at each short side of
    ``RESNET_BACKBONE.LOCALIZATION.SCALES``, keeping the best box, or else at 256 pixels at most.
    """

    @configurable
    def __init__(
        self, *, anchor_generator: nn.Module, hidden: int, center_crop: int, scales: tuple, **rest
    ):
        super().__init__(**rest)
        self.anchor_generator = anchor_generator
        self.center_crop, self.scales = center_crop, tuple(scales)
        self.num_anchors = anchor_generator.num_anchors[0]
        width = self.backbone.output_shape()[self.feature].channels
        self.conv = nn.Conv2d(width, hidden, 3, padding=1)
        self.cls = nn.Conv2d(hidden, self.num_anchors * self.num_classes, 1)
        self.reg = nn.Conv2d(hidden, self.num_anchors * self.num_classes * 4, 1)
        self.init_layers(conv=0.01, cls=0.01, reg=0.01)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        rpn, node = cfg.MODEL.RPN, backbone_node(cfg).LOCALIZATION
        is_dense = node.SCALES and not node.CENTER_CROP
        if is_dense and 0 < cfg.INPUT.MIN_SIZE_TEST < max(node.SCALES):
            text = f"RESNET_BACKBONE.LOCALIZATION.SCALES {list(node.SCALES)} enlarge images again"
            raise UsageError(f"{text}: give INPUT.MIN_SIZE_TEST {max(node.SCALES)}")
        found = cls.read_config(cfg, rpn)
        shape = found["backbone"].output_shape()[found["feature"]]
        return {
            **found,
            "anchor_generator": build_anchor_generator(cfg, [shape]),
            "matcher": Matcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True),
            "box_weights": rpn.BBOX_REG_WEIGHTS,
            "hidden": node.WIDTH,
            "center_crop": node.CENTER_CROP,
            "scales": node.SCALES,
        }

    def predict_sampled(self, inputs: list[dict]) -> Iterator[Tensor]:
        """Returns the arguments of :meth:`losses`."""
        images = ImageList.from_tensors([self.normalize(image["image"]) for image in inputs])
        logits, deltas, anchors = self.predict(images.tensor)
        objects = (image["instances"].to(self.device) for image in inputs)
        samples = (self.sample(anchors, of_image) for of_image in objects)
        rows, *targets = zip(*samples, strict=True)
        chosen = ([part[i] for part, i in zip(one, rows, strict=True)] for one in (logits, deltas))
        return map(torch.cat, (*chosen, *targets))

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits (N, R, C), deltas (N, R, C, 4) and anchors (R, 4).

        Images (N, 3, H, W) are normalized; R is the number of positions times anchors.
        """
        features = self.backbone(images)[self.feature]
        hidden = F.relu(self.conv(features))
        count, (height, width) = len(images), hidden.shape[-2:]
        shape = (count, self.num_anchors, self.num_classes)
        logits = self.cls(hidden).view(*shape, height, width).permute(0, 3, 4, 1, 2)
        deltas = self.reg(hidden).view(*shape, 4, height, width).permute(0, 4, 5, 1, 2, 3)
        (anchors,) = self.anchor_generator([features])
        return logits.flatten(1, 3).float(), deltas.flatten(1, 3).float(), anchors.tensor

    def proposals(
        self, image: Tensor, classes: Tensor, as_tested: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Returns logits (K, R) and boxes (K, R, 4) of classes (K,) in an image (3, H, W), 0..255.

        Boxes are in pixels of the image and clipped to it, or to its center crop. Unless
        ``as_tested``, the whole image is used at a short side of 256 pixels at most.
        """
        found = []
        for view, scale, start in self._views(self.normalize(image), as_tested):
            logits, deltas, anchors = self.predict(view[None])
            moved = self.transform.apply_deltas(deltas[0][:, classes].flatten(1), anchors)
            boxes = Boxes(moved.view(-1, 4))
            boxes.clip(view.shape[-2:])
            boxes = boxes.tensor.view(len(anchors), len(classes), 4) / scale + start
            found.append((logits[0][:, classes].T, boxes.transpose(0, 1)))
        logits, boxes = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return logits, boxes

    def _views(self, image: Tensor, as_tested: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields each view, its scale (4,), and its origin in the image (4,)."""
        height, width = image.shape[-2:]
        if as_tested and self.center_crop:
            high, wide = (min(self.center_crop, side) for side in (height, width))
            y, x = (height - high) // 2, (width - wide) // 2
            view = image[:, y : y + high, x : x + wide]
            yield view, image.new_ones(4), image.new_tensor([x, y, x, y])
            return
        usual = (min(SHORT_SIDE, height, width),)
        for short in (as_tested and self.scales) or usual:
            ratio = short / min(height, width)
            size = [max(1, round(side * ratio)) for side in (height, width)]
            view = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
            scale = image.new_tensor([size[1] / width, size[0] / height] * 2)
            yield view, scale, image.new_zeros(4)

    def detect(self, image: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Returns boxes (C, 4) in pixels of the input, scores (C,) and classes (C,)."""
        classes = torch.arange(self.num_classes, device=self.device)
        logits, boxes = self.proposals(image["image"], classes)
        scores, best = logits.sigmoid().max(dim=1)
        return boxes[classes, best], scores, classes


@META_ARCH_REGISTRY.register()
class LocalizationRCNN(_Localizer):
    """R-CNN on per-class proposals: each is warped to a square; two sibling layers per class.

    The proposals come from a trained and frozen :class:`ClassProposalNetwork`, which is part of the
    weights; the trainer reads it from ``RESNET_BACKBONE.LOCALIZATION.PROPOSALS`` when training
    starts. Training samples the true class's best ``MODEL.RPN.POST_NMS_TOPK_TRAIN`` proposals and
    the objects. Testing scores and regresses the best 200 of each class (paper). In an ensemble,
    each network proposes 200, and scores and boxes are means over the networks.
    """

    @configurable
    def __init__(
        self,
        *,
        proposer: ClassProposalNetwork,
        topk: tuple[int, int],
        nms_threshold: float,
        region_size: int,
        guesses: Mapping[str, Sequence[int]],
        **options,
    ):
        super().__init__(**options)  # the backbone first: MODEL.WEIGHTS go into the first network
        self.proposer = proposer.requires_grad_(False)
        self.topk, self.nms_threshold, self.region_size = topk, nms_threshold, region_size
        self.guesses, self.others = guesses, ()  # the further networks of an ensemble
        width = self.backbone.output_shape()[self.feature].channels
        self.cls = nn.Linear(width, self.num_classes)
        self.reg = nn.Linear(width, self.num_classes * 4)
        self.init_layers(cls=0.01, reg=0.001)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node, heads, rpn = backbone_node(cfg).LOCALIZATION, cfg.MODEL.ROI_HEADS, cfg.MODEL.RPN
        return {
            **cls.read_config(cfg, heads),
            "matcher": Matcher(heads.IOU_THRESHOLDS, heads.IOU_LABELS),
            "box_weights": cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS,
            "proposer": ClassProposalNetwork(cfg),
            "topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_threshold": rpn.NMS_THRESH,
            "region_size": node.REGION_SIZE,
            "guesses": read_guesses(node.GUESSES, backbone_node(cfg).CLASS_NAMES),
        }

    def predict_sampled(self, inputs: list[dict]) -> tuple[Tensor, ...]:
        """Returns the arguments of :meth:`losses`."""
        samples = []
        for image in inputs:
            objects = image["instances"].to(self.device)
            if not len(objects):
                raise UsageError("localization needs images with at least one object in training")
            (boxes,) = self.propose(image["image"], objects.gt_classes[:1], self.topk[0])
            boxes = torch.cat([boxes, objects.gt_boxes.tensor])
            _, *sampled = self.sample(boxes, objects)
            samples.append((self.warp(image["image"], sampled[0]), *sampled))
        crops, *targets = map(torch.cat, zip(*samples, strict=True))
        return *self.predict(crops), *targets

    @torch.no_grad()
    def propose(self, image: Tensor, classes: Tensor, count: int) -> list[Tensor]:
        """Returns the best proposals (Ri, 4) of each class (K,) after NMS, at most ``count``."""
        logits, boxes = self.proposer.eval().proposals(image, classes, not self.training)
        pairs = zip(logits, boxes, strict=True)
        return [own[nms(own, score, self.nms_threshold)[:count]] for score, own in pairs]

    def warp(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Warps regions (R, 4) of an image to normalized squares (R, 3, size, size)."""
        size, image = self.region_size, self.normalize(image)[None]
        return roi_align(image, [boxes.float()], size, sampling_ratio=2, aligned=True)

    def predict(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Maps regions (R, 3, size, size) to logits (R, C) and deltas (R, C, 4)."""
        features = self.backbone(crops)[self.feature].mean((2, 3))
        deltas = self.reg(features).view(len(crops), self.num_classes, 4)
        return self.cls(features).float(), deltas.float()

    def detect(self, image: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Returns boxes (K, 4) in pixels of the input, scores (K,) and classes (K,).

        Classes are the input's ``image_classes`` and the guesses for its ``file_name``, or all
        classes if there are none.
        """
        guessed = self.guesses.get(Path(image.get("file_name", "")).stem, ())
        wanted = dict.fromkeys([*image.get("image_classes", ()), *guessed])
        classes = torch.tensor(list(wanted or range(self.num_classes)), device=self.device)
        members = (self, *self.others)
        proposed = [one.propose(image["image"], classes, self.topk[1]) for one in members]
        found = []
        for number, *boxes in zip(classes, *proposed, strict=True):
            regions = torch.cat(boxes)
            predicted = (one.predict_class(image["image"], regions, number) for one in members)
            score, moved = (torch.stack(part).mean(0) for part in zip(*predicted, strict=True))
            best = score.argmax()
            found.append((moved[best], score[best]))
        return *map(torch.stack, zip(*found, strict=True)), classes

    def predict_class(self, image: Tensor, boxes: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores (R,), 0..1, and boxes (R, 4) of one class for regions (R, 4)."""
        crops = (self.warp(image, part) for part in boxes.split(CHUNK))
        logits, deltas = map(torch.cat, zip(*map(self.predict, crops), strict=True))
        return logits[:, number].sigmoid(), self.transform.apply_deltas(deltas[:, number], boxes)

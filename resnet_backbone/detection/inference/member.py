"""One detector on a batch of images, at several scales and mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.modeling.heads import (
    GlobalContext,
    add_whole_image,
    join_context,
    region_features,
)

CANONICAL_AREA = 224**2  # ideal area of a region in pixels; see choose_scales
Size = tuple[int, int]  # height, width
Predictions = list[tuple[Tensor, Tensor]]  # of each image: scores (R, K + 1), boxes (R, K, 4)


class View(NamedTuple):
    """A batch of images at one scale, and its feature maps."""

    images: ImageList
    maps: dict[str, Tensor]

    @property
    def sizes(self) -> list[Size]:
        return self.images.image_sizes


class ImageViews(NamedTuple):
    """Everything that a detector computes once per batch."""

    reference: View  # at its own test scale, the frame of proposals and boxes
    scaled: list[View]  # one per scale
    mirrored: list[View]  # the same for the mirrored images, or empty


class Member(nn.Module):
    """A detector with its own input format and test scale, alone or in an ensemble.

    Boxes are in pixels of its images at its own test scale ("reference").

    Args:
        cfg, model: its own config, and the model with its weights.
        scales: short sides of the images on which regions are pooled, ascending; empty for the test
            scale alone. The limit ``INPUT.MAX_SIZE_TEST`` grows in proportion.
        flip: pool regions on the mirrored images as well.
    """

    def __init__(
        self, cfg: CfgNode, model: GeneralizedRCNN, scales: Sequence[int] = (), flip: bool = False
    ):
        super().__init__()
        heads = model.roi_heads
        known = isinstance(heads, (Res5ROIHeads, StandardROIHeads)) and model.proposal_generator
        if not known or not isinstance(heads.box_predictor, FastRCNNOutputLayers):
            raise UsageError(
                f"RESNET_BACKBONE.TEST needs StandardROIHeads or C4 heads with a proposal "
                f"network, not {type(heads).__name__} (MODEL.ROI_HEADS.NAME)"
            )
        self.model, self.flip = model, flip
        self.format = cfg.INPUT.FORMAT
        self.short, self.long = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self.scales = list(scales) or [self.short]

    def view_images(self, images: list[Tensor], sources: Sequence[np.ndarray]) -> ImageViews:
        """Computes the feature maps of a batch in this detector's channel order, each once.

        Args:
            images: (C, H, W) each, at the test scale.
            sources: (H, W, C) each, at the original size; used for other scales only.
        """
        pyramid = [
            images if short == self.short else [self.resize(source, short) for source in sources]
            for short in self.scales
        ]
        views = [self._view(level) for level in pyramid]
        known = self.short in self.scales
        reference = views[self.scales.index(self.short)] if known else self._view(images)
        levels = pyramid if self.flip else []
        mirrored = [self._view([image.flip(-1) for image in level]) for level in levels]
        return ImageViews(reference, views, mirrored)

    def resize(self, source: np.ndarray, short: int) -> Tensor:
        """Resizes an image (H, W, C) to `short` pixels on its short side, (C, H, W); 0 keeps it."""
        longest = round(self.long * short / self.short) if short else self.long
        transform = ResizeShortestEdge([short, short], longest).get_transform(source)
        resized = transform.apply_image(source)
        return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))

    def _view(self, images: list[Tensor]) -> View:
        batch = self.model.preprocess_image([{"image": image} for image in images])
        return View(batch, self.model.backbone(batch.tensor))

    def propose(self, views: ImageViews) -> list[Tensor]:
        """Returns the proposals (Ri, 4) of each image."""
        images, maps = views.reference
        proposals, _ = self.model.proposal_generator(images, maps, None)
        return [image.proposal_boxes.tensor for image in proposals]

    def predict(self, views: ImageViews, boxes: list[Tensor]) -> Predictions:
        """Returns scores (Ri, K + 1), background last, and boxes (Ri, K, 4) per image.

        Regions are (Ri, 4). With `flip` the results are averaged with the mirrored image's.
        """
        sizes = views.reference.sizes
        found = self._predict(views.scaled, sizes, boxes)
        if not views.mirrored:
            return found
        turned = [mirror(box, size) for box, size in zip(boxes, sizes, strict=True)]
        other = self._predict(views.mirrored, sizes, turned)
        back = [(s, mirror(b, size)) for (s, b), size in zip(other, sizes, strict=True)]
        return [mean_predictions(pair) for pair in zip(found, back, strict=True)]

    def _predict(self, views: list[View], sizes: list[Size], boxes: list[Tensor]) -> Predictions:
        heads = self.model.roi_heads
        has_context = isinstance(heads, GlobalContext)
        regions = add_whole_image(boxes, sizes) if has_context else boxes
        features, predictor = self._features(views, sizes, regions), heads.box_predictor
        if has_context:
            features = join_context(features, [len(box) for box in boxes])
        logits = predictor(features)
        pairs = zip(sizes, boxes, strict=True)
        proposals = [Instances(size, proposal_boxes=Boxes(box)) for size, box in pairs]
        scores = predictor.predict_probs(logits, proposals)
        regressed = predictor.predict_boxes(logits, proposals)
        classes = predictor.num_classes  # a class-agnostic box is repeated for each
        return [
            (s.float(), b.float().unflatten(1, (-1, 4)).expand(-1, classes, -1))
            for s, b in zip(scores, regressed, strict=True)
        ]

    def _features(self, views: list[View], sizes: list[Size], boxes: list[Tensor]) -> Tensor:
        """Returns features (R, D): from the only scale, or maxout over each region's two scales."""
        scaled = [change_frame(boxes, sizes, view.sizes) for view in views]
        if len(views) == 1:
            return self._pool(views[0], scaled[0])
        areas = torch.stack([Boxes(torch.cat(level)).area() for level in scaled], dim=1)
        merged = None
        for view, level, chosen in zip(views, scaled, choose_scales(areas).unbind(1), strict=True):
            if merged is not None and not chosen.any():
                continue
            masks = chosen.split([len(box) for box in boxes])
            found = self._pool(view, [b[mask] for b, mask in zip(level, masks, strict=True)])
            if merged is None:
                merged = found.new_full((len(chosen), found.shape[1]), -torch.inf)
            merged[chosen] = torch.maximum(merged[chosen], found)
        return merged

    def _pool(self, view: View, boxes: list[Tensor]) -> Tensor:
        return region_features(self.model.roi_heads, view.maps, [Boxes(box) for box in boxes])


def choose_scales(areas: Tensor) -> Tensor:
    """Selects the two adjacent scales at which a region's area is closest to 224 x 224 pixels.

    Paper, appendix B; arXiv 1504.06066: the best scale, and the better of its two neighbors. Areas
    are (R, S) in pixels, ascending in S. The result (R, S) is True for these two.
    """
    distances, count = (areas - CANONICAL_AREA).abs(), areas.shape[1]
    best = distances.argmin(dim=1, keepdim=True)
    adjacent = (torch.arange(count, device=areas.device) - best).abs() <= 1
    _, near = distances.where(adjacent, torch.inf).topk(min(2, count), dim=1, largest=False)
    return torch.zeros_like(adjacent).scatter(1, near, True)


def change_frame(
    boxes: Sequence[Tensor], sizes: Sequence[Size], to: Sequence[Size]
) -> list[Tensor]:
    """Rescales the boxes (..., 4) of each image to another size of that image."""
    return [
        box * box.new_tensor([new_width / width, new_height / height] * 2)
        for box, (height, width), (new_height, new_width) in zip(boxes, sizes, to, strict=True)
    ]


def mirror(boxes: Tensor, size: Size) -> Tensor:
    """Mirrors boxes (..., 4) left to right in an image of this size; its own inverse."""
    (_, width), (x0, y0, x1, y1) = size, boxes.unbind(-1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=-1)


def mean_predictions(predictions: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns the mean scores and mean boxes of several predictions for the same regions."""
    scores, boxes = zip(*predictions, strict=True)
    return torch.stack(scores).mean(dim=0), torch.stack(boxes).mean(dim=0)

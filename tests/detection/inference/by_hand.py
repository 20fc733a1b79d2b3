"""Faster R-CNN's test time with the paper's improvements, in plain loops over single regions.

Of networks only layers are used; everything else is written out in Python's numbers.
"""

import math

import numpy as np
import torch
from detectron2.structures import Boxes
from PIL import Image

AREA = 224 * 224  # of a region in the image of its scale, in pixels


class Eye:
    """One detector on one image: feature maps at each scale, plain and mirrored."""

    def __init__(self, cfg, model, original, main_format, scales, flip):
        self.cfg, self.model = cfg, model
        short, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        if cfg.INPUT.FORMAT != main_format:
            original = original[:, :, ::-1]
        reference = resized(original, short, longest)
        self.size = reference.shape[:2]
        pictures = [resized(original, s, longest * s / short) for s in scales] or [reference]
        self.levels = {False: [self.maps(p) for p in pictures]}
        if flip:
            self.levels[True] = [self.maps(p[:, ::-1]) for p in pictures]
        self.reference = self.maps(reference)
        self.whole = {m: self.feature(self.frame(), m) for m in self.levels}

    def frame(self):
        return [0.0, 0.0, float(self.size[1]), float(self.size[0])]

    def maps(self, picture):
        pixels = torch.tensor(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        images = self.model.preprocess_image([{"image": pixels}])
        return picture.shape[:2], images, self.model.backbone(images.tensor)

    def proposals(self):
        _, images, maps = self.reference
        found = self.model.proposal_generator(images, maps, None)[0][0]
        return found.proposal_boxes.tensor.tolist()

    def feature(self, box, mirrored):
        """One region's feature, the maximum of two scales where there are several."""
        levels = self.levels[mirrored]
        on_level = []
        for (height, width), _, maps in levels:
            scaled = change(box, self.size, (height, width))
            area = (scaled[2] - scaled[0]) * (scaled[3] - scaled[1])
            on_level.append((abs(area - AREA), maps, scaled))
        best = min(range(len(levels)), key=lambda i: on_level[i][0])
        beside = [i for i in (best - 1, best + 1) if 0 <= i < len(levels)]
        used = [best] + ([min(beside, key=lambda i: on_level[i][0])] if beside else [])
        vectors = [self.pooled(*on_level[i][1:]) for i in used]
        return [max(values) for values in zip(*vectors, strict=True)]

    def pooled(self, maps, box):
        heads = self.model.roi_heads
        features = [maps[name] for name in self.cfg.MODEL.ROI_HEADS.IN_FEATURES]
        region = [Boxes(torch.tensor([box]))]
        if hasattr(heads, "res5"):
            cells = heads.res5(heads.pooler(features, region))
            return [channel.mean().item() for channel in cells[0]]
        return heads.box_head(heads.box_pooler(features, region))[0].tolist()

    def look(self, box, mirrored):
        """Scores with the background last, and a box per class."""
        if mirrored:
            box = mirror(box, self.size[1])
        vector = self.feature(box, mirrored)
        if self.cfg.RESNET_BACKBONE.GLOBAL_CONTEXT:
            vector = vector + self.whole[mirrored]
        predictor = self.model.roi_heads.box_predictor
        layers = predictor.cls_score, predictor.bbox_pred
        logits, deltas = (layer(torch.tensor(vector)).tolist() for layer in layers)
        top = max(logits)
        powers = [math.exp(x - top) for x in logits]
        scores = [p / sum(powers) for p in powers]
        boxes = [decode(box, deltas[i : i + 4], self.cfg) for i in range(0, len(deltas), 4)]
        boxes = boxes * (len(scores) - 1) if len(boxes) == 1 else boxes
        if mirrored:
            boxes = [mirror(b, self.size[1]) for b in boxes]
        return scores, boxes


def resized(image, short, longest):
    height, width = image.shape[:2]
    scale = short / min(height, width)
    if max(height, width) * scale > round(longest):
        scale = round(longest) / max(height, width)
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.BILINEAR))


def mirror(box, width):
    return [width - box[2], box[1], width - box[0], box[3]]


def decode(box, delta, cfg):
    wx, wy, ww, wh = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = box[0] + width / 2 + delta[0] / wx * width, box[1] + height / 2 + delta[1] / wy * height
    width *= math.exp(min(delta[2] / ww, math.log(1000 / 16)))
    height *= math.exp(min(delta[3] / wh, math.log(1000 / 16)))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def change(box, size, to):
    sx, sy = to[1] / size[1], to[0] / size[0]
    return [box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy]


def mean(lists):
    return [sum(values) / len(values) for values in zip(*lists, strict=True)]


def look_all(eyes, box):
    """The mean over members of the mean over the image and its mirror image."""
    scores, boxes = [], []
    for eye in eyes:
        own = change(box, eyes[0].size, eye.size)
        seen = [eye.look(own, mirrored) for mirrored in eye.levels]
        scores.append(mean([s for s, _ in seen]))
        per_class = [mean(found) for found in zip(*(b for _, b in seen), strict=True)]
        boxes.append([change(b, eye.size, eyes[0].size) for b in per_class])
    return mean(scores), [mean(found) for found in zip(*boxes, strict=True)]


def clip(box, size):
    limits = (size[1], size[0], size[1], size[0])
    return [min(max(x, 0.0), limit) for x, limit in zip(box, limits, strict=True)]


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def vote(box, voters):
    """voters: (score, box) of the same class."""
    near = [(max(0.0, s), b) for s, b in voters if iou(box, b) > 0.5]
    total = sum(s for s, _ in near)
    if total == 0:
        return box
    return [sum(s * b[i] for s, b in near) / total for i in range(4)]


def suppress(candidates, kind, threshold):
    """Hard NMS or soft-NMS of (score, box) of one class; (score, box) in order of selection."""
    left, kept = [list(pair) for pair in candidates], []
    while left:
        best = max(range(len(left)), key=lambda i: left[i][0])
        score, box = left.pop(best)
        if kind != "hard" and score < 0.001:
            break
        kept.append((score, box))
        still = []
        for s, b in left:
            overlap = iou(box, b)
            if kind == "hard":
                if overlap > threshold:
                    continue
            elif kind == "linear":
                s = s * (1 - overlap) if overlap >= threshold else s
            else:
                s = s * math.exp(-(overlap**2) / 0.5)
            still.append([s, b])
        left = still
    return kept


def detect(eyes, refinement=False, nms="hard"):
    """(class, score, box) in pixels of the first detector's image, best first."""
    cfg, size = eyes[0].cfg, eyes[0].size
    regions = [change(box, eye.size, size) for eye in eyes for box in eye.proposals()]
    found = [look_all(eyes, box) for box in regions]
    threshold = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST
    if refinement:
        threshold = 0.3
        for scores, boxes in list(found):
            best = max(range(len(boxes)), key=lambda c: scores[c])
            region = clip(boxes[best], size)
            if region[2] > region[0] and region[3] > region[1]:
                found.append(look_all(eyes, region))
    detections = []
    for c in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES):
        all_boxes = [(scores[c], clip(boxes[c], size)) for scores, boxes in found]
        above = [pair for pair in all_boxes if pair[0] > cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST]
        for score, box in suppress(above, nms, threshold):
            detections.append((c, score, vote(box, all_boxes) if refinement else box))
    detections.sort(key=lambda d: -d[1])
    return detections[: cfg.TEST.DETECTIONS_PER_IMAGE]

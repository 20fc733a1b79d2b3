"""NMS, soft-NMS, box voting and the choice of scales, against loops over single boxes."""

import by_hand
import pytest
import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_backbone.detection.inference.detector import best_boxes, select_detections, vote_boxes
from resnet_backbone.detection.inference.member import choose_scales

SIZE = (50, 60)
numbers = st.integers(0, 6)
seeds = st.integers(0, 2**31)


def random_predictions(seed, regions, classes, spread=6.0):
    """Boxes (R, K, 4) that crowd around few objects, beyond the image too, and scores."""
    generator = torch.Generator().manual_seed(seed)
    objects = torch.rand(3, 4, generator=generator) * 30
    objects[:, 2:] += objects[:, :2] + 2
    chosen = objects[torch.randint(0, 3, (regions, classes), generator=generator)]
    boxes = chosen + spread * torch.randn(regions, classes, 4, generator=generator)
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2])  # some without an area
    logits = 2 * torch.randn(regions, classes + 1, generator=generator)
    return boxes, logits.softmax(dim=1)


def select(boxes, scores, **options):
    limits = dict(score_threshold=0.05, nms_threshold=0.4, most=9) | options
    return select_detections(boxes.clone(), scores, SIZE, **limits)


@given(seeds, numbers, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_hard_nms_is_detectron2s(seed, regions, classes):
    boxes, scores = random_predictions(seed, regions, classes)
    if regions > 2:
        boxes[0, 0, 1], scores[1, 0] = torch.nan, torch.inf
    ours, limits = select(boxes, scores), (SIZE, 0.05, 0.4, 9)
    theirs, _ = fast_rcnn_inference_single_image(boxes.flatten(1).clone(), scores, *limits)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_classes, theirs.pred_classes)


@pytest.mark.parametrize("vote", [False, True])
@pytest.mark.parametrize("kind", ["hard", "linear", "gaussian"])
@given(seed=seeds, regions=numbers, classes=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_selection_by_hand(kind, vote, seed, regions, classes):
    boxes, scores = random_predictions(seed, regions, classes, spread=3.0)
    found = select(boxes, scores, nms=kind, vote=vote)
    expected = []
    for c in range(classes):
        pairs = zip(scores[:, c].tolist(), boxes[:, c].tolist(), strict=True)
        voters = [(score, by_hand.clip(box, SIZE)) for score, box in pairs]
        above = [pair for pair in voters if pair[0] > 0.05]
        for score, box in by_hand.suppress(above, kind, 0.4):
            expected.append((score, c, by_hand.vote(box, voters) if vote else box))
    expected = sorted(expected, key=lambda e: -e[0])[:9]
    assert found.pred_classes.tolist() == [c for _, c, _ in expected]
    scores = torch.tensor([score for score, *_ in expected])
    torch.testing.assert_close(found.scores, scores)
    corners = torch.tensor([box for *_, box in expected]).reshape(-1, 4)
    torch.testing.assert_close(found.pred_boxes.tensor, corners, rtol=1e-4, atol=1e-3)


def test_voting_of_known_boxes():
    """No votes at an IoU of exactly .5, from other classes, from afar, or with scores below 0."""
    first = [[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 5], [30, 0, 40, 10], [0, 0, 9, 9]]
    second = [[0.0, 0, 10, 10], [2, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 6], [0, 0, 10, 6]]
    boxes = torch.stack([torch.tensor(first), torch.tensor(second)], dim=1)
    scores = torch.tensor([[0.6, 0.0], [0.2, 0.0], [0.9, -1.0], [0.9, 0.0], [-0.5, 0.0]])
    kept, classes = boxes[0].clone(), torch.tensor([0, 1])
    voted = vote_boxes(kept, classes, boxes, scores)
    torch.testing.assert_close(voted[0], torch.tensor([0.0, 0.0, 10.0, 9.5]))  # (6*10 + 2*8) / 8
    assert torch.equal(voted[1], boxes[0, 1])  # no weight at all


@given(st.lists(st.floats(0, 600, width=32), min_size=1, max_size=20), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_two_adjacent_scales(sides, count):
    ratios = torch.tensor([0.4, 0.5, 1.0, 1.3, 2.0, 2.5][:count])
    areas = (torch.tensor(sides)[:, None] * ratios) ** 2
    for row, chosen in zip(areas, choose_scales(areas).tolist(), strict=True):
        distances = [(area - 224 * 224).abs().item() for area in row]  # rounded alike
        used = [index for index, flag in enumerate(chosen) if flag]
        assert len(used) == min(2, count) and used[-1] - used[0] < 2
        best = distances.index(min(distances))
        assert min(distances[index] for index in used) == distances[best]
        if count > 1:
            beside = [distances[i] for i in (used[0] - 1, used[-1] + 1) if 0 <= i < count]
            assert all(max(distances[i] for i in used) <= other for other in beside)


def test_regions_of_the_second_pass():
    """The best class's box, clipped; the background's score does not count; no area, no region."""
    first = [[0.0, 0, 9, 9], [1, 1, 2, 2], [70, 5, 90, 9], [torch.nan, 5, 90, 9]]
    second = [[-5.0, 5, 70, 80], [3, 3, 4, 4], [0, 0, 9, 9], [0, 0, 9, 9]]
    boxes = torch.stack([torch.tensor(first), torch.tensor(second)], dim=1)
    scores = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.9, 0.1, 0.0], [0.9, 0.1, 0.0]])
    assert best_boxes(scores, boxes, SIZE).tolist() == [[0.0, 5.0, 60.0, 50.0], [1, 1, 2, 2]]
    assert best_boxes(scores[:0], boxes[:0], SIZE).shape == (0, 4)


def test_votes_count_in_single_precision():
    """Coordinates are not rounded to bf16 under mixed precision."""
    kept = torch.tensor([[701.3, 403.7, 907.1, 611.9]])
    boxes, scores = torch.stack([kept, kept + 0.6]), torch.tensor([[0.9], [0.3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        voted = vote_boxes(kept, torch.zeros(1, dtype=torch.long), boxes, scores)
    torch.testing.assert_close(voted, kept + 0.15, rtol=0, atol=1e-3)

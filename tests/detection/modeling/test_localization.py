"""The per-class proposal network and R-CNN of ImageNet localization."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from resnet_backbone.detection import build_detector
from resnet_backbone.detection.config import load_config
from resnet_backbone.runtime.errors import UsageError

SMALL = ["MODEL.ROI_HEADS.NUM_CLASSES", "5", "MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "BN"]
SMALL += ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
SMALL += ["MODEL.DEVICE", "cpu", "RESNET_BACKBONE.LOCALIZATION.WIDTH", "16"]


def make(kind, *pairs):
    torch.manual_seed(0)
    return build_detector(load_config(f"imagenet_loc/{kind}_R_50", [*SMALL, *pairs]))


def image(height, width, *boxes, kind=3):
    """An input with a bright rectangle for each box."""
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[:, y0:y1, x0:x1] = 255
    instances = Instances((height, width), gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
    instances.gt_classes = torch.full((len(boxes),), kind)
    return {"image": pixels, "instances": instances, "height": 2 * height, "width": 2 * width}


BOX = (32, 48, 160, 144)


def learn(model, inputs, steps, lr=0.02):
    """The class loss before and after some steps of SGD on the same images."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9)
    losses = []
    with EventStorage():
        for _ in range(steps):
            found = model(inputs)
            losses.append(float(found["loss_loc_cls"].detach()))
            optimizer.zero_grad()
            sum(found.values()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
    return losses[0], losses[-1]


def test_proposals_learn_the_box_of_the_class():
    model = make("rpn")
    inputs = [image(224, 224, BOX), image(224, 224, (100, 20, 210, 120), kind=1)]
    first, last = learn(model, inputs, 40)
    assert last < first / 2
    model.eval()
    with torch.no_grad():
        (output,) = model(inputs[:1])
    found = output["instances"]
    assert found.image_size == (448, 448) and sorted(found.pred_classes.tolist()) == [*range(5)]
    assert found.pred_classes[found.scores.argmax()] == 3
    box = found.pred_boxes.tensor[found.scores.argmax()] / 2
    assert Boxes(box[None]).area()[0] > 0
    overlap = torch.tensor(BOX).float()
    corner, end = torch.maximum(box[:2], overlap[:2]), torch.minimum(box[2:], overlap[2:])
    both = (end - corner).clamp(min=0).prod()
    area = (box[2:] - box[:2]).prod() + (overlap[2:] - overlap[:2]).prod() - both
    assert both / area > 0.5


def test_eight_anchors_of_an_image_half_of_them_positive():
    model = make("rpn")
    _, _, anchors = model.predict(torch.zeros(1, 3, 224, 224))
    assert anchors.shape == (7 * 7 * 9, 4)
    chosen, goal, kinds = model.sample(anchors, image(224, 224, BOX)["instances"])
    positive = kinds == 3
    assert len(chosen) == 8 and 1 <= positive.sum() <= 4 and (kinds[~positive] == 5).all()
    assert (goal[positive] == torch.tensor(BOX)).all()
    chosen, _, kinds = model.sample(anchors, image(224, 224)["instances"])
    assert len(chosen) == 8 and (kinds == 5).all()


@pytest.mark.parametrize(
    "pairs, positions, limit",
    [
        (["CENTER_CROP", "224"], [7 * 7], (48, 16, 272, 240)),
        (["SCALES", "[256]"], [8 * 10], (0, 0, 320, 256)),
        (["SCALES", "[128, 256]"], [4 * 5, 8 * 10], (0, 0, 320, 256)),
        ([], [8 * 10], (0, 0, 320, 256)),
    ],
)
def test_what_is_tested_of_an_image(pairs, positions, limit):
    """Center crop, or the whole image at several scales; boxes end where the view does."""
    keys = [f"RESNET_BACKBONE.LOCALIZATION.{pairs[0]}", pairs[1]] if pairs else []
    model = make("rpn", *keys).eval()
    with torch.no_grad():
        picture = image(256, 320, BOX)["image"]
        logits, boxes = model.proposals(picture, torch.tensor([3, 0]))
    assert logits.shape == (2, 9 * sum(positions)) and boxes.shape == (*logits.shape, 4)
    low, high = boxes.flatten(0, 1).amin(0), boxes.flatten(0, 1).amax(0)
    assert (low >= torch.tensor(limit)[[0, 1, 0, 1]] - 1e-3).all()
    assert (high <= torch.tensor(limit)[[2, 3, 2, 3]] + 1e-3).all()


def test_rcnn_learns_regions_of_a_trained_proposal_network(tmp_path):
    proposer = make("rpn")
    inputs = [image(224, 224, BOX)]
    learn(proposer, inputs, 5)
    torch.save({"model": proposer.state_dict()}, tmp_path / "model_final.pth")
    keys = ["RESNET_BACKBONE.LOCALIZATION.PROPOSALS", str(tmp_path)]
    model = make("rcnn", *keys, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8")
    before = {key: value.clone() for key, value in model.proposer.state_dict().items()}
    assert all(torch.equal(before[key], value) for key, value in proposer.state_dict().items())
    first, last = learn(model, inputs, 12)
    assert last < first / 2
    for key, value in model.proposer.state_dict().items():
        assert torch.equal(before[key], value), "the proposal network stays as it is"
    model.eval()
    with torch.no_grad():
        (output,) = model([{**inputs[0], "image_classes": [3, 1]}])
    assert output["instances"].pred_classes.tolist() == [3, 1]
    assert output["instances"].scores[0] > output["instances"].scores[1]
    model.guesses = {"img7": [3, 4]}
    with torch.no_grad():
        (output,) = model([{**inputs[0], "image_classes": [3], "file_name": "there/img7.jpg"}])
    assert output["instances"].pred_classes.tolist() == [3, 4]


def test_regions_are_warped_to_squares():
    """The crop of a constant rectangle is constant, and its pixels are normalized."""
    model = make("rcnn")
    crops = model.warp(image(224, 224, BOX)["image"], torch.tensor([BOX]))
    assert crops.shape == (1, 3, 224, 224)
    wanted = 255 - model.pixel_mean.flatten()
    assert torch.allclose(crops[0, :, 20:-20, 20:-20].mean((1, 2)), wanted, atol=1e-3)


def test_proposals_of_a_folder_without_a_run(tmp_path):
    with pytest.raises(UsageError, match=r"PROPOSALS .*no model_final\.pth"):
        make("rcnn", "RESNET_BACKBONE.LOCALIZATION.PROPOSALS", str(tmp_path))

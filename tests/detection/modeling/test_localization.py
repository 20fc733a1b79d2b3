"""The per-class proposal network and R-CNN of ImageNet localization."""

import copy
import itertools
import json
import shutil

import drawn_images
import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou

from resnet_backbone.classification.networks import NetworkSpec, save_network
from resnet_backbone.cli import reproduce
from resnet_backbone.detection import build_detector
from resnet_backbone.detection.config import load_config
from resnet_backbone.detection.references import losses_of
from resnet_backbone.models import build_model as build_classifier
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.weights import get_preprocessing, save_weights

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
    for _ in range(steps):
        found = losses_of(model, inputs)
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
    box = Boxes(found.pred_boxes.tensor[found.scores.argmax()][None] / 2)
    assert pairwise_iou(box, Boxes(torch.tensor([BOX]))) > 0.5


def test_eight_anchors_of_an_image_half_of_them_positive():
    model = make("rpn")
    _, _, anchors = model.predict(torch.zeros(1, 3, 224, 224))
    assert anchors.shape == (7 * 7 * 9, 4)
    chosen, _, goal, kinds = model.sample(anchors, image(224, 224, BOX)["instances"])
    positive = kinds == 3
    assert len(chosen) == 8 and 1 <= positive.sum() <= 4 and (kinds[~positive] == 5).all()
    assert (goal[positive] == torch.tensor(BOX)).all()
    chosen, _, _, kinds = model.sample(anchors, image(224, 224)["instances"])
    assert len(chosen) == 8 and (kinds == 5).all()


def test_images_are_not_enlarged_twice():
    with pytest.raises(UsageError, match=r"SCALES \[224, 640\] enl.* give INPUT.MIN_SIZE_TEST 640"):
        make("rpn", "RESNET_BACKBONE.LOCALIZATION.SCALES", "[224,640]")
    crop = ["RESNET_BACKBONE.LOCALIZATION.CENTER_CROP", "224"]
    assert make("rpn", "RESNET_BACKBONE.LOCALIZATION.SCALES", "[224,640]", *crop).center_crop == 224


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


def test_rcnn_learns_regions_of_the_proposals():
    model = make("rcnn", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8")
    inputs = [image(224, 224, BOX)]
    learn(model.proposer.requires_grad_(True), inputs, 5)
    model.proposer.requires_grad_(False)
    before = {key: value.clone() for key, value in model.proposer.state_dict().items()}
    first, last = learn(model, inputs, 24)
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


def test_an_ensemble_scores_the_proposals_of_all_its_networks():
    """Each network is scored by hand on the union; the best mean score has the mean box."""
    networks, number = [make("rcnn").eval(), make("rcnn").eval()], 3
    for seed, network in enumerate(networks):
        torch.manual_seed(seed)
        network.topk = (5, 5)
        for layer in (network.cls, network.reg, network.proposer.cls):
            torch.nn.init.normal_(layer.weight, std=0.01)
    joined = copy.copy(networks[0])
    joined.others = tuple(networks[1:])
    pixels = image(224, 224, BOX)["image"]
    with torch.no_grad():
        found, score, _ = joined.detect({"image": pixels, "image_classes": [number]})
        proposed = [one.propose(pixels, torch.tensor([number]), 5)[0] for one in networks]
        regions, scores, boxes = torch.cat(proposed), 0, 0
        for one in networks:
            logits, deltas = one.predict(one.warp(pixels, regions))
            scores = scores + logits[:, number].sigmoid() / 2
            boxes = boxes + one.transform.apply_deltas(deltas[:, number], regions) / 2
    assert len(regions) == 10 and not torch.equal(*proposed)
    assert torch.allclose(score, scores.max()) and score < 1
    assert torch.allclose(found, boxes[scores.argmax()][None], atol=1e-3)


def test_scales_are_for_testing():
    model, seen = make("rcnn", "RESNET_BACKBONE.LOCALIZATION.SCALES", "[64,128]"), []
    model.topk, predict = (5, 5), model.proposer.predict
    model.proposer.predict = lambda view: seen.append(tuple(view.shape[-2:])) or predict(view)
    inputs = [{**image(96, 144, (8, 8, 60, 60)), "image_classes": [3]}]
    model(inputs)
    assert seen == [(96, 144)]
    with torch.no_grad():
        model.eval()(inputs)
    assert seen[1:] == [(64, 96), (128, 192)]


def test_regions_are_warped_to_squares():
    """The crop of a constant rectangle is constant, and its pixels are normalized."""
    model = make("rcnn")
    crops = model.warp(image(224, 224, BOX)["image"], torch.tensor([BOX]))
    assert crops.shape == (1, 3, 224, 224)
    wanted = 255 - model.pixel_mean.flatten()
    assert torch.allclose(crops[0, :, 20:-20, 20:-20].mean((1, 2)), wanted, atol=1e-3)


@pytest.fixture
def train_loc(train_net, tiny_voc, tiny_coco, tmp_path):
    """Function (kind, run folder, argument...) -> lines of stderr of a run that learns nothing."""
    data = tiny_coco(tmp_path / "bars.json", range(3), only=90)
    network = build_classifier("resnet18", 2)
    save_weights(network, tmp_path / "classifier.safetensors", get_preprocessing("msra"))
    keys = """INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 1
    SOLVER.MAX_ITER 1 SOLVER.BASE_LR 0.0 SOLVER.WEIGHT_DECAY 0.0 DATALOADER.NUM_WORKERS 0
    MODEL.RPN.POST_NMS_TOPK_TEST 5 RESNET_BACKBONE.LOCALIZATION.REGION_SIZE 64""".split()

    def run(kind, output, *words, code=0):
        paths = ["--coco-json", data, data, "--image-root", tiny_voc / "JPEGImages"]
        words = ["--output-dir", output, *paths, *words]
        if kind:
            words += ["--weights", tmp_path / "classifier.safetensors", *SMALL[6:], *keys]
        return train_net(kind and f"imagenet_loc/{kind}_R_50.yaml", *words, code=code)

    return run, network


def test_rcnn_needs_the_classifier_and_the_proposals_at_its_start_alone(train_loc, tmp_path):
    train, classifier = train_loc
    proposals, run = tmp_path / "rpn", tmp_path / "rcnn"
    key = "RESNET_BACKBONE.LOCALIZATION.PROPOSALS"
    (error,) = train("rcnn", run, code=2)[-1:]
    assert f"{key} is empty" in error
    train("rpn", proposals)
    train("rcnn", run, key, proposals)
    files = (folder / "model_final.pth" for folder in (run, proposals))
    state, trained = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(state[f"proposer.{key}"], value) for key, value in trained.items())
    own = {key: value for key, value in state.items() if key.startswith("backbone.")}
    known = {f"backbone.{key}": value for key, value in classifier.state_dict().items()}
    del own["backbone.input_settings"]
    assert len(own) == 100 and all(torch.equal(value, known[key]) for key, value in own.items())
    other = torch.load(proposals / "model_final.pth", weights_only=True)
    other["class_names"] = ["owl", "cat"]
    torch.save(other, proposals / "model_final.pth")
    (error,) = train("rcnn", tmp_path / "other", key, proposals, code=2)[-1:]
    assert "was trained on the classes ['owl', 'cat']" in error
    shutil.rmtree(proposals)
    (error,) = train("rcnn", tmp_path / "absent", key, proposals, code=2)[-1:]
    assert "has no checkpoint" in error
    train(None, run, "--eval-only")
    result = json.loads((run / "eval" / "results.json").read_text())["results"]["localization"]
    assert 0 <= result["true_class_error"] <= 100
    member, flip = "RESNET_BACKBONE.TEST.ENSEMBLE", "RESNET_BACKBONE.TEST.FLIP"
    (error,) = train(None, run, "--eval-only", member, "['x']", flip, "True", code=2)[-1:]
    assert "need GeneralizedRCNN (ENSEMBLE: or LocalizationRCNN)" in error
    train(None, run, "--eval-only", member, f"['{run}']")
    again = json.loads((run / "eval" / "results.json").read_text())["results"]["localization"]
    assert again == result
    config = (run / "config.yaml").read_text()
    (tmp_path / "rgb").mkdir()
    shutil.copy(run / "model_final.pth", tmp_path / "rgb")
    (tmp_path / "rgb" / "config.yaml").write_text(config.replace("FORMAT: BGR", "FORMAT: RGB"))
    (error,) = train(None, run, "--eval-only", member, f"['{tmp_path / 'rgb'}']", code=2)[-1:]
    assert "see the same image" in error
    train("rcnn", run, "--resume", key, proposals, "SOLVER.MAX_ITER", "2")


@pytest.mark.slow
def test_one_command_makes_the_papers_table(run_command, tmp_path):
    data, boxes = tmp_path / "Data" / "CLS-LOC", tmp_path / "Annotations" / "CLS-LOC"
    names = ("n01", "n02")
    for number, (split, name) in enumerate(itertools.product(("train", "train", "val"), names)):
        for folder in (data, boxes):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        drawn_images.picture(80, 96, seed=number).save(data / split / name / f"{number}.JPEG")
        text = drawn_images.voc_xml(f"{number}.JPEG", (96, 80), [(name, (8, 8, 60, 60))])
        (boxes / split / name / f"{number}.xml").write_text(text)
    weights, msra = tmp_path / "classifier.safetensors", get_preprocessing("msra")
    spec = NetworkSpec("resnet18", len(names))
    save_network(weights, build_classifier("resnet18", 2), spec, msra, class_names=names)
    small = """INPUT.MIN_SIZE_TRAIN (64,) SOLVER.IMS_PER_BATCH 1 SOLVER.MAX_ITER 1
    DATALOADER.NUM_WORKERS 0 MODEL.RPN.POST_NMS_TOPK_TEST 5
    RESNET_BACKBONE.LOCALIZATION.REGION_SIZE 64""".split()
    words = ["--scale", "imagenet_loc", "--imagenet", data, "--weights", f"pretrained={weights}"]
    words += ["--weights", f"second={weights}"]
    words += ["--output", tmp_path / "out", "--set", *SMALL[6:], *small]
    status, printed, error = run_command(reproduce.main, *words)
    assert status == 0, error
    (page,) = (tmp_path / "out").glob("report-*/localization.md")
    rows = [line.split(" | ") for line in page.read_text().splitlines() if "ResNet-18" in line]
    wanted = ["| RPN | center crop", "| RPN | dense", "| RPN + R-CNN | dense"]
    assert [" | ".join(row[:2]) for row in rows] == [*wanted, wanted[-1]]
    assert "ResNet-18 and 1 more" in rows[3]
    errors = [float(cell.split(" [")[0]) for row in rows for cell in row[-3:]]
    assert all(0 <= error <= 100 for error in errors)

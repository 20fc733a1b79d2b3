"""The improvements in whole detectors, against loops over single regions (by_hand.py)."""

import itertools

import by_hand
import numpy as np
import pytest
import torch
from detectron2.engine import defaults
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Instances
from PIL import Image

from resnet_backbone.detection import improve, with_global_context
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.inference import member
from resnet_backbone.detection.inference.detector import ImprovedDetector, Switches
from resnet_backbone.detection.inference.member import Member
from resnet_backbone.detection.inference.predictor import for_testing
from resnet_backbone.fast import InferenceNetwork
from resnet_backbone.fast.engines import why_not

FAMILIES = ("C4", "VGG", "FPN")
CHEAP = dict(MODEL__ROI_HEADS__NUM_CLASSES=3, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.02)
CHEAP |= dict(MODEL__RPN__PRE_NMS_TOPK_TEST=100, MODEL__RPN__POST_NMS_TOPK_TEST=4)
CHEAP |= dict(INPUT__MIN_SIZE_TEST=64, INPUT__MAX_SIZE_TEST=96)
SIZES = ((61, 83), (47, 93))  # the long side of the second meets MAX_SIZE_TEST
AREA = 30 * 30  # in place of 224 x 224: these regions are small
built = {}


@pytest.fixture
def detector(make_family, monkeypatch):
    """Function (family, seed, KEY=value...) -> config and model whose scores and boxes differ."""
    monkeypatch.setattr(member, "CANONICAL_AREA", AREA)
    monkeypatch.setattr(by_hand, "AREA", AREA)

    def make(family, seed=0, **keys):
        name = f"{family} {seed} {keys}"
        if name not in built:
            cfg = make_family(family, **(CHEAP | keys))
            torch.manual_seed(seed)
            built[name] = cfg, build_model(with_global_context(cfg)).eval()
            spread(built[name][1])
        cfg, model = built[name]
        return cfg.clone(), model

    return make


@torch.no_grad()
def spread(model):
    """Scales the last two layers so that logits and deltas have a standard deviation of 1.5."""
    seen = {}
    predictor = model.roi_heads.box_predictor
    for name, layer in (("cls_score", predictor.cls_score), ("bbox_pred", predictor.bbox_pred)):
        layer.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    model([{"image": entry["image"]} for entry in make_inputs("BGR")])
    for name, out in seen.items():
        layer = getattr(predictor, name)
        layer._forward_hooks.clear()
        centered = out - out.mean(dim=0)
        layer.weight *= 1.5 / centered.std()
        layer.bias -= out.mean(dim=0) * 1.5 / centered.std()


def make_inputs(image_format, short=64, longest=96):
    """Two inputs of odd sizes, with the originals, as a Predictor gives them."""
    entries = []
    for seed, (height, width) in enumerate(SIZES):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
        rgb = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BILINEAR))
        original = np.ascontiguousarray(rgb if image_format == "RGB" else rgb[:, :, ::-1])
        picture = by_hand.resized(original, short, longest)
        pixels = torch.tensor(picture.transpose(2, 0, 1).copy())
        entries.append(dict(image=pixels, height=height, width=width, original=original))
    return entries


def compare(found, wanted, entry, size):
    """Instances of a detector, and a list of `by_hand.detect`."""
    classes, scores, boxes = zip(*wanted, strict=True)
    boxes = [by_hand.change(box, size, (entry["height"], entry["width"])) for box in boxes]
    assert found.pred_classes.tolist() == list(classes)
    torch.testing.assert_close(found.scores, torch.tensor(scores), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor(boxes), rtol=1e-3, atol=5e-2)


def check_by_hand(detectors, switches):
    """The same detections of each image as in plain loops."""
    cfg = detectors[0][0]
    members = [Member(*pair, switches.scales, switches.flip) for pair in detectors]
    improved = ImprovedDetector(members, switches).eval()
    inputs = make_inputs(cfg.INPUT.FORMAT)[: 2 if len(members) == 1 else 1]
    expected, sizes = [], []
    with torch.no_grad():
        for entry in inputs:
            given = entry["original"], cfg.INPUT.FORMAT, switches.scales, switches.flip
            eyes = [by_hand.Eye(*pair, *given) for pair in detectors]
            expected.append(by_hand.detect(eyes, switches.refinement, switches.nms))
            sizes.append(eyes[0].size)
    for entry, wanted, size in zip(inputs, expected, sizes, strict=True):
        compare(improved([entry])[0]["instances"], wanted, entry, size)


SWITCHES = [Switches(), Switches(refinement=True), Switches(flip=True)]
SWITCHES += [Switches(scales=(40, 64, 88, 120)), Switches(scales=(96,))]
SWITCHES += [Switches(scales=(48, 80))]  # the proposals' scale is not among them
SWITCHES += [Switches(nms="linear"), Switches(nms="gaussian")]
SWITCHES += [Switches(refinement=True, nms="gaussian")]
SWITCHES += [Switches(refinement=True, scales=(48, 64, 96), flip=True)]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_each_switch_by_hand(detector, switches):
    check_by_hand([detector("FPN")], switches)


@pytest.mark.parametrize("family", ["C4", "VGG"])
def test_other_heads_by_hand(detector, family):
    check_by_hand([detector(family)], Switches(refinement=True, scales=(48, 64, 96)))


@pytest.mark.parametrize("family", FAMILIES)
def test_global_context_by_hand(detector, family):
    one = detector(family, RESNET_BACKBONE__GLOBAL_CONTEXT=True)
    check_by_hand([one], Switches())
    check_by_hand([one], Switches(scales=(48, 64, 96), flip=family == "FPN"))


def test_ensemble_by_hand(detector):
    """Other backbones, heads, sizes, channel orders and normalizations; one with context."""
    other = dict(INPUT__FORMAT="BGR", INPUT__MIN_SIZE_TEST=80, INPUT__MAX_SIZE_TEST=112)
    other |= dict(MODEL__PIXEL_MEAN=[103.5, 116.3, 123.7], MODEL__PIXEL_STD=[1.0, 1.0, 1.0])
    first = detector("FPN", RESNET_BACKBONE__GLOBAL_CONTEXT=True)
    check_by_hand([first, detector("VGG", seed=1, **other)], Switches(flip=True))
    three = [first, detector("FPN", seed=1, **other), detector("FPN", seed=2)]
    check_by_hand(three, Switches(refinement=True, scales=(64, 96), nms="linear"))


def test_class_agnostic_boxes_by_hand(detector):
    one = detector("FPN", MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True)
    check_by_hand([one, detector("FPN", seed=1)], Switches(refinement=True))


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_off_is_detectron2s_inference(detector, family, context):
    """Bit for bit, in a batch of different sizes and one by one."""
    cfg, model = detector(family, RESNET_BACKBONE__GLOBAL_CONTEXT=context)
    assert improve(cfg, model) is model
    inputs = make_inputs(cfg.INPUT.FORMAT)
    improved = ImprovedDetector([Member(cfg, model)]).eval()
    with torch.no_grad():
        for batch in (inputs, inputs[:1], inputs[1:]):
            for ours, theirs in zip(improved(batch), model(batch), strict=True):
                check_equal(ours["instances"], theirs["instances"])


def check_equal(ours: Instances, theirs: Instances):
    assert len(theirs) and set(ours.get_fields()) == set(theirs.get_fields())
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_classes, theirs.pred_classes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_its_images_give(detector, family):
    """Padding to the largest image is seen by no region, up to the last layers' borders."""
    cfg, model = detector(family)
    switches = Switches(refinement=True, scales=(64, 96), flip=True)
    improved = ImprovedDetector([Member(cfg, model, (64, 96), True)], switches).eval()
    entry = make_inputs(cfg.INPUT.FORMAT)[0]
    with torch.no_grad():
        (alone,), pair = improved([entry]), improved([entry, entry])
    theirs = alone["instances"]
    for ours in (output["instances"] for output in pair):
        assert ours.pred_classes.tolist() == theirs.pred_classes.tolist()
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
        boxes = theirs.pred_boxes.tensor
        torch.testing.assert_close(ours.pred_boxes.tensor, boxes, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "family, context", [("C4", True), ("VGG", False), ("FPN", False), ("FPN", True)]
)
def test_no_proposals(detector, family, context, monkeypatch):
    """An image without proposals, alone and beside one that has some."""
    cfg, model = detector(family, RESNET_BACKBONE__GLOBAL_CONTEXT=context)
    inputs = make_inputs(cfg.INPUT.FORMAT)
    switches = Switches(refinement=True, scales=(64, 96), flip=True)
    member = Member(cfg, model, switches.scales, switches.flip)
    improved, propose = ImprovedDetector([member], switches).eval(), member.propose

    def few(views):
        return [propose(views)[0][:0], *propose(views)[1:]]

    monkeypatch.setattr(member, "propose", few)
    assert len(improved(inputs[:1])[0]["instances"]) == 0
    first, second = improved(inputs)
    assert len(first["instances"]) == 0 and len(second["instances"]) > 0


def test_nothing_above_the_threshold(detector):
    cfg, model = detector("FPN", MODEL__ROI_HEADS__SCORE_THRESH_TEST=1.0)
    for nms, refinement in itertools.product(("hard", "linear", "gaussian"), (False, True)):
        switches = Switches(refinement=refinement, nms=nms)
        improved = ImprovedDetector([Member(cfg, model)], switches).eval()
        for output in improved(make_inputs(cfg.INPUT.FORMAT)):
            assert len(output["instances"]) == 0
            assert output["instances"].pred_boxes.tensor.shape == (0, 4)


def test_features_are_computed_once(detector):
    """One pass of the backbone per scale and mirror image, one of the proposals per detector."""
    cfg, model = detector("FPN")
    calls = {"backbone": 0, "proposals": 0}
    for name, module in (("backbone", model.backbone), ("proposals", model.proposal_generator)):
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    switches = Switches(refinement=True, scales=(48, 64, 96), flip=True)
    improved = ImprovedDetector([Member(cfg, model, switches.scales, True)], switches).eval()
    improved(make_inputs(cfg.INPUT.FORMAT))
    assert calls == {"backbone": 6, "proposals": 1}


def test_switches_of_the_config(detector):
    values = dict(BOX_REFINEMENT=True, SCALES=[96, 64], FLIP=True, NMS="linear")
    keys = {f"RESNET_BACKBONE__TEST__{key}": value for key, value in values.items()}
    cfg, model = detector("FPN", **keys)
    improved = improve(cfg, model)
    wanted = Switches(refinement=True, scales=(64, 96), flip=True, nms="linear")
    by_parts = ImprovedDetector([Member(cfg, model, (64, 96), True)], wanted)
    with pytest.raises(RuntimeError, match="inference"):
        by_parts.train()(make_inputs("BGR"))
    by_parts.eval()
    assert not improved.training
    inputs = make_inputs(cfg.INPUT.FORMAT)
    for ours, theirs in zip(improved(inputs), by_parts(inputs), strict=True):
        check_equal(ours["instances"], theirs["instances"])


REFUSED = {
    "NMS 'soft' is not one of hard, agnostic, linear, gaussian": dict(NMS="soft"),
    "short sides in whole pixels": dict(SCALES=[200, 200]),
    "short sides": dict(SCALES=[0]),
    "turn one of them off": dict(FLIP=True, TEST__AUG__ENABLED=True),
    "MODEL.META_ARCHITECTURE is RetinaNet": dict(FLIP=True, MODEL__META_ARCHITECTURE="RetinaNet"),
    "INPUT.MIN_SIZE_TEST": dict(SCALES=[200], INPUT__MIN_SIZE_TEST=0),
    "has no config.yaml": dict(ENSEMBLE=["nowhere"]),
    "PRECISION 'bf16' is not one of float32, bfloat16, float16": dict(PRECISION="bf16"),
    "ENGINE: engine 'tensorrt' is not one of auto, eager": dict(ENGINE="tensorrt"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_contradictions_are_refused(detector, message):
    cfg, model = detector("FPN")
    for key, value in REFUSED[message].items():
        key = key.replace("__", ".") if "__" in key else f"RESNET_BACKBONE.TEST.{key}"
        cfg.merge_from_list([key, value])
    with pytest.raises(UsageError, match=message):
        improve(cfg, model)


def test_evaluations_of_a_training_follow_the_switches(detector, monkeypatch):
    cfg, model = detector("FPN", RESNET_BACKBONE__TEST__FLIP=True, DATASETS__TEST=("voc_2007_val",))
    monkeypatch.setattr(Trainer, "build_test_loader", lambda cfg, name: ["a batch"])
    monkeypatch.setattr(Trainer, "build_evaluator", lambda cfg, name: None)
    run = []
    monkeypatch.setattr(defaults, "inference_on_dataset", lambda *given: run.append(given) or {})
    Trainer.test(cfg, model)
    ((timed, *_),) = run
    tested = timed.model
    assert isinstance(tested, ImprovedDetector) and tested.members[0].model is model
    cfg.RESNET_BACKBONE.TEST.NMS = "soft"
    with pytest.raises(UsageError, match="NMS 'soft'"):
        Trainer(cfg)


def test_masks_are_those_of_the_detector(detector):
    cfg, model = detector("FPN", MODEL__MASK_ON=True, MODEL__ROI_MASK_HEAD__CONV_DIM=8)
    inputs = make_inputs(cfg.INPUT.FORMAT)
    improved = ImprovedDetector([Member(cfg, model)]).eval()
    with torch.no_grad():
        for ours, theirs in zip(improved(inputs), model(inputs), strict=True):
            check_equal(ours["instances"], theirs["instances"])
            assert torch.equal(ours["instances"].pred_masks, theirs["instances"].pred_masks)


def test_cascade_heads_are_refused(make_family):
    keys = dict(MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True, RESNET_BACKBONE__TEST__FLIP=True)
    cfg = make_family("FPN", MODEL__ROI_HEADS__NAME="CascadeROIHeads", **keys)
    with pytest.raises(UsageError, match="not CascadeROIHeads"):
        improve(cfg, build_model(cfg))


def test_the_file_gives_other_scales(detector, tmp_path):
    """Without "original" they are made from file_name; a file of another size is refused."""
    cfg, model = detector("FPN", INPUT__FORMAT="BGR")
    improved = ImprovedDetector([Member(cfg, model, (64, 96))], Switches(scales=(64, 96))).eval()
    entry = make_inputs(cfg.INPUT.FORMAT)[0]
    expected = improved([entry])[0]["instances"]
    path = tmp_path / "image.png"
    Image.fromarray(entry.pop("original")[:, :, ::-1].copy()).save(path)  # BGR
    entry["file_name"] = str(path)
    check_equal(improved([entry])[0]["instances"], expected)
    with pytest.raises(ValueError, match=r"image.png.* got \(83, 61\), expect \(83, 60\)"):
        improved([{**entry, "height": 60}])
    del entry["file_name"]
    assert len(improved([entry])[0]["instances"]) > 0


def test_detectron2s_augmentation(detector):
    """TEST.AUG: the union of GeneralizedRCNNWithTTA, with our backbones and heads."""
    for family, context in (("C4", True), ("VGG", False), ("FPN", True)):
        keys = dict(TEST__AUG__ENABLED=True, TEST__AUG__MIN_SIZES=(48, 64))
        cfg, model = detector(family, RESNET_BACKBONE__GLOBAL_CONTEXT=context, **keys)
        entry = make_inputs(cfg.INPUT.FORMAT)[:1]
        with torch.no_grad():
            found, wanted = improve(cfg, model)(entry), GeneralizedRCNNWithTTA(cfg, model)(entry)
        check_equal(found[0]["instances"], wanted[0]["instances"])


def test_precision_and_engine_are_those_of_testing(detector):
    """Mixed precision of a training (SOLVER.AMP) does not count; TEST.PRECISION does."""
    keys = dict(SOLVER__AMP__ENABLED=True, RESNET_BACKBONE__TEST__BOX_REFINEMENT=True)
    keys |= dict(RESNET_BACKBONE__TEST__SCALES=[64, 96], RESNET_BACKBONE__TEST__FLIP=True)
    keys |= dict(MODEL__ROI_BOX_HEAD__POOLER_TYPE="ROIAlignV2")  # RoIPool has float32 alone
    for family in FAMILIES:
        cfg, model = detector(family, RESNET_BACKBONE__GLOBAL_CONTEXT=True, **keys)
        inputs, exact = make_inputs(cfg.INPUT.FORMAT), for_testing(cfg, model)
        assert isinstance(exact, ImprovedDetector)  # without a wrapper
        cfg.RESNET_BACKBONE.TEST.PRECISION = "bfloat16"
        mixed = [for_testing(cfg, model).eval()]
        if not why_not("openvino", torch.bfloat16):
            cfg.RESNET_BACKBONE.TEST.ENGINE = "openvino"
            mixed.append(for_testing(cfg, model))
            assert isinstance(mixed[-1], ImprovedDetector)
        for fast in mixed:
            for ours, theirs in zip(fast(inputs), exact(inputs), strict=True):
                found, wanted = ours["instances"], theirs["instances"]
                assert found.scores.dtype == torch.float32 and len(found) > 0
                assert 0 < abs(found.scores[0] - wanted.scores[0]) < 0.1
        ran = {part.engine for part in mixed[-1].modules() if isinstance(part, InferenceNetwork)}
        assert ran == ({"eager", "openvino"} if len(mixed) == 2 else set())


def test_int8_has_its_ranges_from_a_folder(detector, tmp_path):
    cfg, model = detector("FPN", MODEL__ROI_BOX_HEAD__POOLER_TYPE="ROIAlignV2")
    cfg.RESNET_BACKBONE.TEST.PRECISION = "int8"
    with pytest.raises(UsageError, match="int8 and CALIBRATION, a folder of images, need each"):
        for_testing(cfg, model)
    cfg.RESNET_BACKBONE.TEST.CALIBRATION = str(tmp_path / "gone")
    with pytest.raises(UsageError, match="CALIBRATION .*gone: no such folder"):
        for_testing(cfg, model)
    cfg.RESNET_BACKBONE.TEST.CALIBRATION = str(tmp_path)
    with pytest.raises(UsageError, match="ENGINE: engine eager has no int8: use openvino"):
        for_testing(cfg, model)
    cfg.RESNET_BACKBONE.TEST.ENGINE = "openvino"
    problem = why_not("openvino", torch.int8)
    if problem:
        pytest.skip(f"openvino {problem}")
    with pytest.raises(ValueError, match="CALIBRATION .*: no images found"):
        for_testing(cfg, model)
    cfg.RESNET_BACKBONE.TEST.ENSEMBLE = [str(tmp_path)]
    with pytest.raises(UsageError, match="ENSEMBLE: all members run in PyTorch"):
        for_testing(cfg, model)
    cfg.RESNET_BACKBONE.TEST.ENSEMBLE = []
    inputs = make_inputs(cfg.INPUT.FORMAT)
    for number, entry in enumerate(inputs):
        Image.fromarray(entry["original"][:, :, ::-1]).save(tmp_path / f"{number}.png")
    fast = for_testing(cfg, model)
    parts = [part for part in fast.modules() if isinstance(part, InferenceNetwork)]
    assert {part.engine for part in parts} == {"int8"} and len(parts) == 3
    found, wanted = (run(inputs)[0]["instances"] for run in (fast, model))
    assert 0 < abs(found.scores[0] - wanted.scores[0]) < 0.1

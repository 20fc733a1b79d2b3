"""The backbone inside Detectron2's detectors and ours; Caffe2's blobs against its converter."""

import pickle
from pathlib import Path

import pytest
import torch
from drawn_networks import meta_state, on_meta, randomize
from libraries import assert_same, detectron2_resnet

detectron2 = pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.modeling import build_model as build_detector  # noqa: E402

from resnet_backbone.detection import add_resnet_backbone_config  # noqa: E402
from resnet_backbone.models import build_model  # noqa: E402
from resnet_backbone.weights.architecture import infer_models  # noqa: E402
from resnet_backbone.weights.checkpoint import ModelSpec  # noqa: E402
from resnet_backbone.weights.keymaps import LAYOUTS, recognize  # noqa: E402
from resnet_backbone.weights.keymaps.table import without_counters  # noqa: E402

ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection" / "voc"
DETECTRON2, CAFFE2 = LAYOUTS["detectron2"], LAYOUTS["caffe2"]
FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
DETECTORS = {
    "C4": ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",),
    "DC5": ("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",),
    "FPN": (FPN, "MODEL.KEYPOINT_ON", True, "MODEL.FPN.NORM", "BN"),
    "FPN of BN": (FPN, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
    "Panoptic": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",),
    "RetinaNet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml",),
    "Semantic": ("Misc/semantic_R_50_FPN_1x.yaml",),
}


def detector_state(file, *options):
    """A detector's tensors without values."""
    cfg = add_resnet_backbone_config(get_cfg())
    cfg.merge_from_file(str(file))
    cfg.merge_from_list([*options, "MODEL.DEVICE", "meta"])
    return on_meta(build_detector, cfg).state_dict()


@pytest.mark.parametrize("name", DETECTORS)
def test_detectron2s_detectors(name):
    file, *options = DETECTORS[name]
    state = detector_state(ZOO / file, *options)
    assert recognize(state) == "detectron2"
    tensors = DETECTRON2.to_ours(state)
    assert infer_models(tensors) == [ModelSpec("resnet50")]
    ours = meta_state("resnet50", out_features=["res5"])
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in ours.items()}
    place = "backbone." if name in ("C4", "DC5") else "backbone.bottom_up."
    assert tensors["res4.5.conv3.weight"] is state[place + "res4.5.conv3.weight"]
    if name == "C4":
        assert tensors["res5.2.conv3.weight"] is state["roi_heads.res5.2.conv3.weight"]


@pytest.mark.parametrize(
    "file, found, size",
    [
        ("faster_rcnn_R_18_FPN.yaml", ModelSpec("resnet18"), 100),
        ("faster_rcnn_R_101_C4.yaml", ModelSpec("resnet101"), 520),
        ("faster_rcnn_VGG_16.yaml", ModelSpec("vgg16"), 30),  # with fc6 and fc7
        ("faster_rcnn_VGG_16_FPN.yaml", ModelSpec("vgg16"), 26),
    ],
)
def test_our_detectors(file, found, size):
    state = detector_state(CONFIGS / file)
    assert recognize(state) == "detectron2"
    tensors = DETECTRON2.to_ours(state)
    assert infer_models(tensors) == [found]
    assert len(tensors) == size
    assert ("fc6.weight" in tensors) == (size == 30)


def backbone_state(prefix):
    return on_meta(build_model, "resnet18", out_features=["res5"]).state_dict(prefix=prefix)


UNKNOWN = """backbone.bottom_up.neck.weight backbone.bottom_up.res2x.weight linear.weight
    backbone.res2.0.conv1.weight teacher.backbone.stem.conv1.weight"""


@pytest.mark.parametrize("key", UNKNOWN.split())
def test_unknown_parts_of_a_detector(key):
    state = backbone_state("backbone.bottom_up.")
    for part in ("pixel_mean", "roi_heads.box_head.fc6.weight"):  # another head than VGG's
        state[part] = torch.ones(3)
    assert infer_models(DETECTRON2.to_ours(state)) == [ModelSpec("resnet18")]
    with pytest.raises(ValueError, match=f"key '{key}' is not one of a Detectron2 ResNet"):
        DETECTRON2.to_ours({**state, key: torch.ones(1)})


def test_two_stages_of_one_name():
    state = backbone_state("backbone.")
    twice = {**state, "roi_heads.res5.0.conv1.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="names res5.0.conv1.weight, which the backbone has too"):
        DETECTRON2.to_ours(twice)


def test_no_backbone():
    with pytest.raises(ValueError, match="no backbone: none of stem.conv1.weight"):
        DETECTRON2.to_ours({"roi_heads.box_head.fc1.weight": torch.ones(1)})


STAGES = ("res2", "res3", "res4", "res5")
NETWORKS = [("resnet18", "BN"), ("resnet50", "BN"), ("resnet50", "GN"), ("resnet152", "BN")]
OTHER_SPELLING = {"bn_s": "bn_gamma", "bn_b": "bn_beta"}
OTHER_SPELLING |= {"bn_rm": "bn_running_mean", "bn_riv": "bn_running_var"}


def random_tensors(name, norm="BN"):
    """A classifier's tensors with norms that are not the identity."""
    torch.manual_seed(0)
    return without_counters(randomize(build_model(name, 7, norm=norm)).state_dict())


def blobs_of(tensors, name, norm="BN"):
    options = {"norm": norm} if norm != "BN" else {}
    return CAFFE2.from_ours(tensors, ModelSpec(name, 7, options))


def respell(blobs):
    """The names in MSRA's files as Detectron2's model zoo has them."""
    renamed = {}
    for key, value in blobs.items():
        for ending, other in OTHER_SPELLING.items():
            if key.endswith(f"_{ending}"):
                key = key.removesuffix(ending) + other
        renamed[key.replace("pred_", "fc1000_")] = value
    return renamed


@pytest.mark.parametrize("name, norm", NETWORKS)
def test_names_are_those_of_detectron2s_converter(name, norm):
    tensors = random_tensors(name, norm)
    blobs = blobs_of(tensors, name, norm)
    converted, _ = convert_c2_detectron_names(blobs)
    assert_same(converted, tensors)
    assert recognize(blobs) == "caffe2"
    assert_same(CAFFE2.to_ours(blobs), tensors)


def test_the_other_spelling():
    """That of Detectron2's ImageNetPretrained/MSRA files; their converter knows both."""
    tensors = random_tensors("resnet50")
    blobs = respell(blobs_of(tensors, "resnet50"))
    assert "res_conv1_bn_gamma" in blobs and "res2_0_branch2a_bn_running_var" in blobs
    assert_same(CAFFE2.to_ours(blobs), tensors)
    converted, _ = convert_c2_detectron_names(blobs)
    assert converted["stem.conv1.norm.running_var"] is blobs["res_conv1_bn_running_var"]


def test_bias_of_the_first_convolution():
    """MSRA's ResNet-50 has one; it moves into the running mean, exactly the same function."""
    tensors = random_tensors("resnet18")
    blobs = {**blobs_of(tensors, "resnet18"), "conv1_b": torch.randn(64)}
    found = CAFFE2.to_ours(blobs)
    expected = tensors["stem.conv1.norm.running_mean"] - blobs["conv1_b"]
    assert torch.equal(found.pop("stem.conv1.norm.running_mean"), expected)
    del tensors["stem.conv1.norm.running_mean"]
    assert_same(found, tensors)


@pytest.mark.parametrize(
    "name, fused", [("resnet18", True), ("resnet50", True), ("resnet50", False)]
)
@torch.no_grad()
def test_the_function_is_that_of_detectron2(name, fused, tmp_path):
    """Also with statistics folded into scale and shift, as Detectron1's files have them."""
    blobs = blobs_of(random_tensors(name), name)
    if fused:
        blobs = {k: v for k, v in blobs.items() if not k.endswith(("_rm", "_riv"))}
    theirs = detectron2_resnet(name, norm="FrozenBN", out_features=list(STAGES)).eval()
    arrays = {key: value.numpy() for key, value in blobs.items()}
    (tmp_path / "R.pkl").write_bytes(pickle.dumps({"blobs": arrays}))
    DetectionCheckpointer(theirs).load(str(tmp_path / "R.pkl"))
    ours = build_model(name, out_features=STAGES).eval()
    tensors = CAFFE2.to_ours(blobs)
    assert infer_models(tensors) == [ModelSpec(name, 7)]
    ours.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("linear")})
    images = torch.randn(1, 3, 64, 64)
    expected = theirs(images)
    for stage, features in ours(images).items():
        scale = expected[stage].abs().max()
        assert scale > 0.1, "the test is blind"
        assert (features - expected[stage]).abs().max() < 1e-4 * max(1, scale)


def test_one_norm_without_statistics_is_damage():
    blobs = blobs_of(random_tensors("resnet18"), "resnet18")
    del blobs["res4_0_branch2b_bn_rm"], blobs["res4_0_branch2b_bn_riv"]
    with pytest.raises(ValueError, match="missing, the first is res4.0.conv2.norm.running_mean"):
        infer_models(CAFFE2.to_ours(blobs))


def test_detectors_and_solvers_blobs_are_left_out():
    """The other blobs of Detectron1's Faster, Mask and Keypoint R-CNN, and RetinaNet."""
    tensors = random_tensors("resnet18")
    tensors = {key: value for key, value in tensors.items() if not key.startswith("linear")}
    blobs = blobs_of(tensors, "resnet18")
    others = (
        "fpn_inner_res5_1_sum_w fpn_res2_1_sum_b conv_rpn_fpn2_w rpn_cls_logits_fpn2_w conv_rpn_w "
        "rpn_bbox_pred_b fc6_w fc7_b cls_score_w bbox_pred_w head_conv1_gn_s _[mask]_fcn1_w "
        "mask_fcn_logits_w conv5_mask_w conv_fcn1_w kps_score_w retnet_cls_conv_n0_fpn3_w "
        "conv1_w_momentum res2_0_branch2a_w_momentum __preserve__/conv1_w"
    ).split()
    found = CAFFE2.to_ours({**blobs, **dict.fromkeys(others, torch.ones(1))})
    assert_same(found, tensors)


def test_vgg():
    torch.manual_seed(0)
    tensors = build_model("vgg16", out_features=["conv5"]).state_dict()
    tensors |= {"fc6.weight": torch.ones(2, 3), "fc7.bias": torch.ones(2)}
    tensors["linear.bias"] = torch.ones(1)
    blobs = CAFFE2.from_ours(tensors, ModelSpec("vgg16"))
    assert {"conv1_1_w", "conv5_3_b", "fc6_w", "fc7_b", "fc8_b"} <= set(blobs)
    assert recognize(blobs) == "caffe2"
    assert_same(CAFFE2.to_ours({**blobs, "cls_score_w": torch.ones(1)}), tensors)


@pytest.mark.parametrize(
    "key, message",
    [
        ("conv2_w", "key 'conv2_w' is not one of a Caffe2 ResNet"),
        ("res6_0_branch2a_w", "res6_0_branch2a_w"),
        ("res2_0_branch2a_bn_gamma", "names a tensor that another key names, too"),
        ("conv1_bn_s", "another key names, too"),
        ("lr", "key 'lr'"),
    ],
)
def test_unknown_blobs(key, message):
    blobs = blobs_of(random_tensors("resnet18"), "resnet18")
    with pytest.raises(ValueError, match=message):
        CAFFE2.to_ours({**blobs, key: torch.ones(1)})


def test_bias_before_group_norm():
    blobs = blobs_of(random_tensors("resnet18", "GN"), "resnet18", "GN")
    with pytest.raises(ValueError, match="has no stem.conv1.bias"):
        infer_models(CAFFE2.to_ours({**blobs, "conv1_b": torch.ones(64)}))

"""configs/detection/modern against Detectron2's zoo, whose files take our backbones, too."""

import re
import shlex
from pathlib import Path

import detectron2
import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from resnet_backbone.detection import build_detector
from resnet_backbone.detection.config import load_config
from resnet_backbone.runtime.records import flatten

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "detection" / "modern"
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml"))
# Everything that may differ from the zoo's config, by the form of the network: key -> why.
OURS = "our network in place of Detectron2's, with the same weights and the same outputs"
MASK_HEAD = {"MODEL.ROI_MASK_HEAD.NUM_CONV": "a mask head's, which MASK_ON False leaves unused"}
DIFFERENCES = {
    "C4": {"MODEL.BACKBONE.NAME": OURS, "MODEL.ROI_HEADS.NAME": OURS},
    "DC5": {"MODEL.BACKBONE.NAME": OURS, **MASK_HEAD},
    "FPN": {"MODEL.BACKBONE.NAME": OURS, **MASK_HEAD},
}
# What MoCo's pascal_voc_R_50_C4_24k.yaml sets beside the zoo's VOC config (facebookresearch/moco,
# detection/configs); ours is its Res5ROIHeadsExtraNorm.
MOCO = {"MODEL.BACKBONE.FREEZE_AT": 0, "MODEL.RESNETS.NORM": "naiveSyncBN"}
MOCO |= {"TEST.PRECISE_BN.ENABLED": True, "SOLVER.STEPS": (18000, 22000), "SOLVER.MAX_ITER": 24000}
# Detectron2's MODEL_ZOO.md: box AP and training seconds an iteration on 8 GPUs.
PUBLISHED = {
    "coco_R_50_C4_1x": (35.7, 0.551),
    "coco_R_50_DC5_1x": (37.3, 0.380),
    "coco_R_50_FPN_1x": (37.9, 0.210),
    "coco_R_50_C4_3x": (38.4, 0.543),
    "coco_R_50_DC5_3x": (39.0, 0.378),
    "coco_R_50_FPN_3x": (40.2, 0.209),
    "coco_R_101_C4_3x": (41.1, 0.619),
    "coco_R_101_DC5_3x": (40.6, 0.452),
    "coco_R_101_FPN_3x": (42.0, 0.286),
    "voc_R_50_C4": (51.9, 0.537),
}


def zoo_file(name: str) -> Path:
    data, rest = name.removesuffix(".yaml").removesuffix("_moco").split("_", 1)
    folder = {"coco": "COCO-Detection", "voc": "PascalVOC-Detection"}[data]
    return ZOO / folder / f"faster_rcnn_{rest}.yaml"


def overrides(name: str) -> list[str]:
    """The config's debug override."""
    pattern = r"^# Debug: add (.*(?:\n# [A-Z_]+\.[A-Z_.]+ .*)*)"
    match = re.search(pattern, (FOLDER / name).read_text(), re.M)
    return shlex.split(match[1].replace("\n# ", " "))


def test_there_is_one_for_each_of_the_zoos():
    zoo = {
        f"{data}_{path.stem.removeprefix('faster_rcnn_')}.yaml"
        for data, folder in (("coco", "COCO-Detection"), ("voc", "PascalVOC-Detection"))
        for path in (ZOO / folder).glob("faster_rcnn_R_*.yaml")
    }
    assert {*NAMES} - {"voc_R_50_C4_moco.yaml"} == zoo


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_zoos_key_by_key(make_cfg, name):
    theirs, ours = get_cfg(), make_cfg(f"modern/{name}")
    theirs.merge_from_file(str(zoo_file(name)))
    theirs.MODEL.DEVICE = "cpu"
    if "moco" in name:
        theirs.merge_from_list([item for pair in MOCO.items() for item in pair])
    expected, found = dict(flatten(theirs)), dict(flatten(ours))
    found = {key: value for key, value in found.items() if not key.startswith("RESNET_BACKBONE")}
    assert found.keys() == expected.keys()
    differing = {key for key in expected if found[key] != expected[key]}
    assert differing == DIFFERENCES[re.search("C4|DC5|FPN", name)[0]].keys()
    node = ours.RESNET_BACKBONE
    assert node.REFERENCE_BATCH == ours.SOLVER.IMS_PER_BATCH == 16
    assert node.TRAIN_ON_DIFFICULT == name.startswith("voc"), "Detectron2's loader keeps them"


BACKBONES = {  # Detectron2's -> ours
    "build_resnet_backbone": "build_paper_resnet_backbone",
    "build_resnet_fpn_backbone": "build_paper_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_paper_resnet_p6p7_backbone",
}
ZOO_NAMES = [
    path.relative_to(ZOO).as_posix()
    for path in sorted(ZOO.glob("*/*_R_*.yaml")) + sorted(ZOO.glob("*/panoptic_fpn_R_*.yaml"))
    if path.parent.name != "quick_schedules" and "dconv" not in path.name
]  # without ResNeXts and deformable convolutions
AMONG_THEM = "retinanet_R_50_FPN_1x mask_rcnn_R_50_C4_1x cascade_mask_rcnn_R_50_FPN_1x".split()


@pytest.mark.parametrize(
    "name",
    [
        name if Path(name).stem in AMONG_THEM else pytest.param(name, marks=pytest.mark.slow)
        for name in dict.fromkeys(ZOO_NAMES)
    ],
)
def test_files_of_the_zoo_build_with_our_backbone(name):
    keys = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    theirs = load_config(str(ZOO / name), keys)
    keys += ["MODEL.BACKBONE.NAME", BACKBONES[theirs.MODEL.BACKBONE.NAME]]
    models = build_model(theirs), build_detector(load_config(str(ZOO / name), keys))
    parameters = [sum(value.numel() for value in model.parameters()) for model in models]
    assert parameters[0] == parameters[1]
    kinds = {type(module).__name__ for module in models[1].modules()}
    assert "PaperResNet" in kinds and "ResNet" not in kinds


@pytest.mark.parametrize("name", NAMES)
def test_opens_with_its_story(name):
    text = (FOLDER / name).read_text()
    assert text.startswith(f"# resnet-backbone train-net --config-file modern/{name[:-5]} ")
    assert "# Your own data: --" in text and "# GPU hours: " in text
    stem = name.removesuffix(".yaml")
    if stem in PUBLISHED:
        accuracy, seconds = PUBLISHED[stem]
        iterations = load_config(str(FOLDER / name), []).SOLVER.MAX_ITER
        assert f"# Expected: AP {accuracy}" in text and f"{seconds:.3f} s an iteration" in text
        hours = int(re.search(r"# GPU hours: (\d+)", text)[1])
        assert hours == round(8 * seconds * iterations / 3600)
    else:
        assert "# GPU hours: not measured" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_debug_override_is_one(name):
    cfg = load_config(str(FOLDER / name), overrides(name))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (20, 2)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (320,) and "SyncBN" not in cfg.MODEL.RESNETS.NORM

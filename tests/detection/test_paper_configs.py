"""configs/detection/paper: every protocol builds, trains a step, and deviates as its files say."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from torch.nn import functional as F
from torchvision.ops import RoIPool

from resnet_backbone.detection import Checkpointer
from resnet_backbone.detection.checkpoint.input_check import read_key
from resnet_backbone.detection.data.arguments import _adopt
from resnet_backbone.detection.engine.schedule import scale_schedule
from resnet_backbone.detection.references import losses_of

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "detection" / "paper"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml") if not path.name.startswith("Base"))
# Appendix A, Faster R-CNN and Fast R-CNN: for VOC and COCO, and for each of them
BOTH = {"INPUT.MIN_SIZE_TRAIN": (600,), "INPUT.MAX_SIZE_TRAIN": 1000}
BOTH |= {"INPUT.MIN_SIZE_TEST": 600, "INPUT.MAX_SIZE_TEST": 1000}
BOTH |= {"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 16, "MODEL.RPN.BOUNDARY_THRESH": 0}
BOTH |= {"MODEL.RPN.POST_NMS_TOPK_TEST": 300, "MODEL.RPN.SMOOTH_L1_BETA": pytest.approx(1 / 9)}
BOTH |= {"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64, "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.3}
BOTH |= {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1.0}
BOTH |= {"SOLVER.WEIGHT_DECAY": 0.0005, "SOLVER.WEIGHT_DECAY_BIAS": 0.0}
BOTH |= {"SOLVER.BIAS_LR_FACTOR": 2.0, "RESNET_BACKBONE.TRAIN_ON_DIFFICULT": False}
EACH = {
    "MODEL.ANCHOR_GENERATOR.SIZES": ([[128, 256, 512]], [[64, 128, 256, 512]]),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": ([0.1, 0.5], [0.5]),  # VOC: too little overlap is not used
    "MODEL.ROI_HEADS.IOU_LABELS": ([-1, 0, 1], [0, 1]),
    "SOLVER.STEPS": ((60000,), (240000,)),
    "SOLVER.MAX_ITER": (80000, 320000),
}


def test_every_network_has_every_protocol():
    data = ("voc_07", "voc_07_12", "voc_07_12_test12", "coco", "coco_trainval")
    names = {f"{one}_{net}.yaml" for one in data for net in ("VGG_16", "R_50", "R_101", "R_152")}
    names |= {"voc_07_12_from_coco_R_101.yaml", "voc_07_12_test12_from_coco_R_101.yaml"}
    assert names == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_protocol(make_cfg, name):
    cfg, column = make_cfg(f"paper/{name}"), int(name.startswith("coco"))
    for key, expected in BOTH.items():
        assert read_key(cfg, key) == expected, key
    for key, expected in EACH.items():
        anchors = "coco" in name and "SIZES" in key  # those that its weights have
        assert read_key(cfg, key) == expected[anchors or column], key
    depth = re.search(r"R_(\d+)", name)
    if depth:
        assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM) == (int(depth[1]), "FrozenBN")
        assert cfg.MODEL.ROI_HEADS.NAME == "PaperRes5ROIHeads"
        assert cfg.MODEL.RPN.CONV_DIMS == [512]
    else:
        assert cfg.MODEL.BACKBONE.FREEZE_AT == 2, "tuned from conv3_1 up"
    assert (cfg.MODEL.WEIGHTS == "") == cfg.RESNET_BACKBONE.GLOBAL_CONTEXT == ("from_coco" in name)
    assert cfg.RESNET_BACKBONE.CAFFE_POOL == ("torchvision" not in cfg.MODEL.WEIGHTS)
    text = (FOLDER / name).read_text()
    assert f"--config-file paper/{name.removesuffix('.yaml')}" in text and "# Expected: " in text


def test_the_deviations_say_detectron2s_defaults():
    """In the base file the comment behind each key begins with the default."""
    defaults, checked = get_cfg(), 0
    path: list[str] = []
    for line in (FOLDER / "Base-Paper.yaml").read_text().splitlines():
        match = re.fullmatch(r"( *)([A-Z_0-9]+):(?: +(\S.*?) +# ([^;:]+).*)?", line)
        if not match or match[2] == "VERSION":
            continue
        path[len(match[1]) // 2 :] = [match[2]]
        if match[3] is None:
            continue
        default, said = read_key(defaults, ".".join(path)), match[4].partition(" (L1)")[0]
        checked += 1
        assert str(default) == said.replace("as for weights", "None"), path
    assert checked == 16


@pytest.mark.parametrize("name", ["voc_07_R_50.yaml", "voc_07_VGG_16.yaml", "coco_R_50.yaml"])
def test_a_step(make_cfg, make_images, small, name):
    """Joint training with the protocol's sampling, solver and pooling, on a random image."""
    small = small | dict(MODEL__RPN__PRE_NMS_TOPK_TRAIN=200, MODEL__RPN__POST_NMS_TOPK_TRAIN=50)
    cfg = make_cfg(f"paper/{name}", MODEL__WEIGHTS="", SOLVER__IMS_PER_BATCH=1, **small)
    planned = make_cfg(f"paper/{name}")
    scale_schedule(cfg, planned, {"SOLVER.IMS_PER_BATCH"})
    torch.manual_seed(0)
    model = build_model(cfg)
    poolers = [module for module in model.modules() if isinstance(module, RoIPool)]
    assert poolers and poolers[0].output_size == ((7, 7) if "VGG" in name else (14, 14))
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([cfg.SOLVER.BASE_LR, 2 * cfg.SOLVER.BASE_LR])
    losses = losses_of(model, make_images((160, 160)))
    sum(losses.values()).backward()
    optimizer.step()
    scheduler.step()
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.data
def test_the_released_weights_run_with_the_pool_of_caffe(make_cfg, make_images, data_root):
    path = str(data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors")
    model = build_model(make_cfg("paper/coco_R_50.yaml")).eval()
    Checkpointer(model, preprocessing="msra").load(path)
    stem, images = model.backbone.stem, model.preprocess_image(make_images((74, 90))).tensor
    with torch.no_grad():
        found, expected = stem(images), F.max_pool2d(stem.conv1(images), 3, 2, ceil_mode=True)
    assert torch.equal(found, expected) and found.shape[2:] == (18, 22)  # padded: 19 x 23


def test_vocs_test_set_of_2012(make_cfg, make_voc, monkeypatch):
    """Detectron2 does not know it: images without annotations, for the server's files."""
    root = make_voc({"t": []}, folder="VOC2012", split="test")
    (root / "Annotations" / "t.xml").unlink()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root.parent))
    cfg = make_cfg("paper/voc_07_12_test12_R_50.yaml")
    (name,) = cfg.DATASETS.TEST
    for _ in range(2):
        _adopt(name, cfg, "refuse")
        (image,) = DatasetCatalog.get(name)
        assert (image["image_id"], image["annotations"]) == ("t", [])
    metadata = MetadataCatalog.get(name)
    assert (metadata.year, metadata.split) == (2012, "test")
    assert metadata.thing_classes[0] == "aeroplane"

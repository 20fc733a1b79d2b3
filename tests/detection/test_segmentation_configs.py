"""Every config of configs/segmentation builds, takes a training step, and predicts its kind."""

import re
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, PolygonMasks
from safetensors.torch import load_file

from resnet_backbone.detection import DeepLabResNet, PaperResNet
from resnet_backbone.detection.config import load_config
from resnet_backbone.detection.data import arguments
from resnet_backbone.detection.data.arguments import detects_objects, labels_pixels
from resnet_backbone.detection.data.mapper import mapper_options
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.references import losses_of
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.weights import WeightsError

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "segmentation"
CONFIGS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/*.yaml"))
DEEPLAB = "coco/deeplab_v3plus_R_50_OS16.yaml"
TINY = """MODEL.FPN.OUT_CHANNELS 32 MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 20
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0
MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 32 MODEL.SEM_SEG_HEAD.CONVS_DIM 32
TEST.DETECTIONS_PER_IMAGE 5 MODEL.DEVICE cpu""".split()
DEEPLAB_TINY = ["MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", "32", "INPUT.CROP.ENABLED", "False"]
POINT_TINY = ["MODEL.ROI_MASK_HEAD.FC_DIM", "32", "MODEL.POINT_HEAD.FC_DIM", "32"]


def load(name, *overrides, depth=18):
    """A config with narrow heads on ResNet-18."""
    keys = [*TINY, "MODEL.RESNETS.DEPTH", str(depth), "MODEL.WEIGHTS", ""]
    keys += DEEPLAB_TINY if "deeplab" in name else []
    keys += POINT_TINY if "pointrend" in name else []
    if "deeplab" in name and depth == 18:
        keys += ["MODEL.RESNETS.RES5_MULTI_GRID", "[1, 2]"]  # one rate for each block of res5
    cfg = load_config(str(FOLDER / name), [*keys, *overrides])
    things = ["a", "b", "c"] if detects_objects(cfg) else []
    labels = ["background", "x", "y", "z"] if labels_pixels(cfg) else []
    arguments.set_class_counts(cfg, things, labels)
    return cfg


def example(cfg, found):
    """An input with what the model learns from, to be shown in twice its size."""
    height, width = size = found["height"], found["width"]
    found |= {"height": 2 * height, "width": 2 * width, "image_id": 1}
    instances = found.pop("instances")
    if detects_objects(cfg):
        boxes = instances.gt_boxes.tensor.tolist()
        masks = PolygonMasks([[[x, y, x1, y, x1, y1, x, y1]] for x, y, x1, y1 in boxes])
        if cfg.INPUT.MASK_FORMAT == "bitmask":
            masks = BitMasks.from_polygon_masks(masks, height, width)
        instances.gt_masks, found["instances"] = masks, instances
    if labels_pixels(cfg):
        found["sem_seg"] = torch.randint(0, 4, size)
        found["sem_seg"][:5] = 255
    return found


def names_of_losses(cfg):
    known = set()
    if detects_objects(cfg):
        known = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    if "Cascade" in cfg.MODEL.ROI_HEADS.NAME:
        boxes = {"loss_cls", "loss_box_reg"}
        known = known - boxes | {f"{name}_stage{stage}" for name in boxes for stage in range(3)}
    if "pointrend" in cfg.MODEL.ROI_HEADS.NAME.lower():
        known |= {"loss_mask_point"}
    return known | ({"loss_sem_seg"} if labels_pixels(cfg) else set())


def test_there_is_a_config_for_each_family():
    for family in ("mask_rcnn_R_50_FPN", "mask_rcnn_R_50_C4", "pointrend", "panoptic", "semantic"):
        assert any(family in name for name in CONFIGS), family
    for version in ("v3", "v3plus"):
        assert {f"coco/deeplab_{version}_R_50_OS{stride}.yaml" for stride in (8, 16)} < set(CONFIGS)


@pytest.mark.parametrize(
    "name, depth",
    [
        *((name, 18) for name in CONFIGS if "R_50" in name or "cityscapes" in name),
        *(
            pytest.param(name, int(re.search(r"R_(\d+)", name)[1]), marks=pytest.mark.slow)
            for name in CONFIGS
        ),
    ],
)
def test_learns_and_predicts(name, depth, make_images):
    cfg = load(name, depth=depth)
    inputs = [example(cfg, given) for given in make_images((64, 75), (61, 90))]
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    head = "roi_heads.mask_head" if detects_objects(cfg) else "sem_seg_head"
    losses = losses_of(model.train(), inputs)
    assert set(losses) == names_of_losses(cfg)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    slopes = [p.grad for n, p in model.named_parameters() if n.startswith(head)]
    assert slopes and all(slope is not None and slope.isfinite().all() for slope in slopes)
    with torch.no_grad():
        output = model.eval()(inputs[:1])[0]
    if detects_objects(cfg):
        assert output["instances"].pred_masks.shape[1:] == (128, 150)
        assert len(output["instances"]) > 0 or depth > 18  # random deep ones are too sure
    if labels_pixels(cfg):
        assert output["sem_seg"].shape == (4, 128, 150)
    assert ("panoptic_seg" in output) == (cfg.MODEL.META_ARCHITECTURE == "PanopticFPN")


BACKBONES = {DEEPLAB: "backbone", "coco/semantic_R_50_FPN.yaml": "backbone.bottom_up"}
BACKBONES["coco/panoptic_R_50_FPN.yaml"] = "backbone.bottom_up"


@pytest.mark.data
@pytest.mark.parametrize("name, backbone", BACKBONES.items())
def test_weights_load_and_another_stride_is_refused(name, backbone, data_root):
    """Also where the model, like SemanticSegmentor, does not know its channel order."""
    file = str(data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors")
    named = ["RESNET_BACKBONE.WEIGHTS_PREPROCESSING", "msra"]
    cfg = load(name, *named, depth=50)
    model = build_model(cfg)
    Trainer.build_checkpointer(cfg, model).load(file)
    expected = load_file(file)["conv1.weight"].float()
    assert torch.equal(model.get_submodule(backbone).stem.conv1.weight.detach(), expected)
    for wrong in (["MODEL.RESNETS.STRIDE_IN_1X1", "False"], ["INPUT.FORMAT", "RGB"]):
        cfg = load(name, *named, *wrong, depth=50)
        with pytest.raises(WeightsError, match=wrong[0]):
            Trainer.build_checkpointer(cfg, build_model(cfg)).load(file)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("coco/deeplab")])
def test_deeplab_backbone_equals_detectron2s(name):
    """Same dilations, multi-grid and strides: the project's own ResNet, with the basic stem, takes
    our weights strictly and gives the same maps."""
    cfg = load(name, "MODEL.RESNETS.NORM", "BN", "INPUT.CROP.ENABLED", "True", depth=50)
    assert cfg.INPUT.CROP.TYPE == "absolute" and list(cfg.INPUT.CROP.SIZE) == [512, 512]
    torch.manual_seed(0)
    ours = build_backbone(cfg).eval()
    assert isinstance(ours, DeepLabResNet) and isinstance(ours, PaperResNet)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    theirs = build_backbone(cfg).eval()
    assert ours.output_shape() == theirs.output_shape()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    stride = int(name.partition("_OS")[2][:-5])
    assert ours.output_shape()["res5"].stride == ours.size_divisibility == stride
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_deeplab_backbone_without_our_node():
    """Detectron2's own DeepLab script has the project's keys and not ours."""
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "build_paper_resnet_deeplab_backbone", "cpu"
    cfg.MODEL.RESNETS.update(DEPTH=18, STEM_TYPE="basic", RES4_DILATION=2, RES5_DILATION=4)
    cfg.MODEL.RESNETS.update(RES5_MULTI_GRID=[1, 2], OUT_FEATURES=["res5"])
    backbone = build_backbone(cfg)
    rates = [block.conv2.dilation[0] for block in backbone.res5]
    assert backbone.output_shape()["res5"].stride == 8 and rates == [4, 8]


V3 = "coco/deeplab_v3_R_50_OS16.yaml"


@pytest.mark.parametrize(
    "name, key, value, words",
    [
        (DEEPLAB, "MODEL.RESNETS.STEM_TYPE", "deeplab", "STEM_TYPE deeplab is not a network of"),
        (DEEPLAB, "RESNET_BACKBONE.RES4_DILATION", "2", "RES4_DILATION 2 contradicts"),
        (DEEPLAB, "RESNET_BACKBONE.MULTI_GRID", "[1, 1]", "leave RESNET_BACKBONE.MULTI_GRID out"),
        (DEEPLAB, "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "8", "8 is not the stride of res2, 4: set"),
        (DEEPLAB, "MODEL.RESNETS.OUT_FEATURES", "['res5']", r"names \['res2'\], but the backbone"),
        (DEEPLAB, "INPUT.CROP.TYPE", "relative", "relative: DeepLabV3PlusHead learns from crops"),
        (V3, "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "8", "8 is not the stride of res5, 16"),
        (V3, "MODEL.RESNETS.RES5_DILATION", "1", "16 is not the stride of res5, 32: set"),
        (V3, "INPUT.CROP.TYPE", "relative_range", "TYPE absolute"),
    ],
)
def test_deeplab_backbone_refuses(name, key, value, words):
    """Also a stride by which the map would be larger or smaller than the image, without a word."""
    crops = ["INPUT.CROP.ENABLED", "True"] if "CROP" in key else []
    with pytest.raises(UsageError, match=words):
        build_backbone(load(name, *crops, key, value))


def test_deeplab_backbone_needs_the_projects_keys(make_cfg):
    cfg = make_cfg(MODEL__BACKBONE__NAME="build_paper_resnet_deeplab_backbone")
    with pytest.raises(UsageError, match="add_deeplab_config"):
        build_backbone(cfg)


@pytest.mark.parametrize("name", ["coco/pointrend_R_50_FPN.yaml", DEEPLAB])
def test_a_detectron2_without_projects_is_told(name, monkeypatch):
    for module in ("deeplab", "point_rend"):
        monkeypatch.setitem(sys.modules, f"detectron2.projects.{module}", None)
    with pytest.raises(UsageError, match="needs detectron2.projects.*pip install 'git"):
        load_config(str(FOLDER / name), [])


def test_crop_is_applied_after_resizing_and_filled_up():
    cfg = load("cityscapes/deeplab_v3_R_101_OS16.yaml", "INPUT.CROP.ENABLED", "True")
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (40, 80), "INPUT.CROP.SIZE", (48, 64)])
    steps = T.AugmentationList(mapper_options(cfg)["augmentations"])
    for _ in range(8):
        pixels = torch.randint(1, 255, (50, 60, 3), dtype=torch.uint8).numpy()
        given = T.AugInput(pixels, sem_seg=torch.ones(50, 60, dtype=torch.uint8).numpy())
        steps(given)
        assert given.image.shape == (48, 64, 3) and given.sem_seg.shape == (48, 64)
        assert set(given.sem_seg.ravel()) <= {1, 255}


def test_crop_keeps_the_configs_flip():
    for kind, expected in (("none", []), ("horizontal", [False]), ("vertical", [True])):
        overrides = ["INPUT.RANDOM_FLIP", kind, "INPUT.CROP.ENABLED", "True"]
        steps = mapper_options(load(DEEPLAB, *overrides))["augmentations"]
        flips = [step for step in steps if isinstance(step, T.RandomFlip)]
        assert [step.vertical for step in flips] == expected
        assert all(step.horizontal != step.vertical for step in flips)


def test_poly_schedule_falls_to_nothing(make_cfg):
    cfg = load(DEEPLAB, "SOLVER.MAX_ITER", "10", "SOLVER.WARMUP_ITERS", "0")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], cfg.SOLVER.BASE_LR)
    schedule, rates = Trainer.build_lr_scheduler(cfg, optimizer), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.01 * (1 - i / 10) ** 0.9 for i in range(10)])


def test_c4_masks_read_the_depths_own_res5():
    for depth, channels in ((34, 512), (50, 2048)):
        heads = build_model(load("coco/mask_rcnn_R_50_C4.yaml", depth=depth)).roi_heads
        assert heads.mask_head[0].in_channels == channels and len(heads.res5) == 3

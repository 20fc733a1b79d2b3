"""Detectron2's own trainers, predictor, checkpointer and configs, with our backbones."""

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import detectron2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.engine import DefaultPredictor, DefaultTrainer, SimpleTrainer, defaults, hooks
from detectron2.evaluation import PascalVOCDetectionEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import PolygonMasks
from omegaconf import OmegaConf

from resnet_backbone.detection import PaperResNet, build_detector
from resnet_backbone.detection.config import load_config
from resnet_backbone.detection.data import register_voc
from resnet_backbone.detection.references import losses_of
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.weights import WeightsError

NAMES = {"train": "upstream_train", "test": "upstream_test"}


@pytest.fixture
def cfg(make_cfg, small, tiny_voc, tmp_path):
    for split, name in NAMES.items():
        register_pascal_voc(name, str(tiny_voc), split, 2007, class_names=["bar", "box"])
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    cfg = make_cfg("quickstart/faster_rcnn_R_18_FPN.yaml", **small)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (NAMES["train"],), (NAMES["test"],)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.IMS_PER_BATCH = 2, (), 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.SOLVER.AMP.ENABLED = False  # Detectron2's needs a GPU
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg


class Trainer(DefaultTrainer):
    """Detectron2's trainer; the evaluator is what it asks users to give."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return PascalVOCDetectionEvaluator(dataset_name)


def test_default_trainer_trains_resumes_and_predicts(cfg, tmp_path):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "AP50" in trainer._last_eval_results["bbox"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"

    cfg.SOLVER.MAX_ITER = 3
    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    trained = trainer.model.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in again.model.state_dict().items())
    again.train()
    assert again.iter == 3

    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    for key, value in (("INPUT.FORMAT", "RGB"), ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675])):
        other = cfg.clone()
        other.merge_from_list([key, value])
        for load in (DefaultPredictor, lambda cfg: Trainer(cfg).resume_or_load(resume=True)):
            with pytest.raises(WeightsError, match=f"on other input: {key} is .*; set {key}"):
                load(other)
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    found = DefaultPredictor(cfg)(image)["instances"]
    again.model.eval()
    again.model.roi_heads.box_predictor.test_score_thresh = 0.0
    tensor = torch.from_numpy(image.astype("float32").transpose(2, 0, 1))
    with torch.no_grad():
        expected = again.model([dict(image=tensor, height=64, width=96)])[0]["instances"]
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["R_18_C4", "R_18_DC5", "VGG_16", "VGG_16_FPN"])
def test_default_trainer_with_other_detectors(make_cfg, cfg, file):
    other = make_cfg(f"voc/faster_rcnn_{file}.yaml", MODEL__ROI_BOX_HEAD__FC_DIM=16)
    for key in ("DATASETS", "INPUT", "SOLVER", "OUTPUT_DIR", "DATALOADER"):
        other[key] = cfg[key]
    other.MODEL.ROI_HEADS.NUM_CLASSES = 2
    other.SOLVER.BASE_LR = 1e-4
    trainer = Trainer(other)
    trainer.train()
    assert trainer.iter == 2


ENV_MODULE = """
from resnet_backbone import detection

def setup_environment():
    detection.was_set_up = True
"""
REGISTERED = """
import sys
import detectron2  # alone
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.env import setup_custom_environment

assert "build_paper_resnet_backbone" in BACKBONE_REGISTRY, "not registered"
setup_custom_environment(sys.argv[1])
assert sys.modules["resnet_backbone.detection"].was_set_up
"""


def test_env_module(tmp_path):
    """DETECTRON2_ENV_MODULE (detectron2/utils/env.py) brings our backbones to any script.

    It may name our module, or a file that imports it.
    """
    plugin = tmp_path / "plugin.py"
    plugin.write_text(ENV_MODULE)
    command = [sys.executable, "-W", "ignore", "-c", REGISTERED, str(plugin)]
    environment = os.environ | {"DETECTRON2_ENV_MODULE": "resnet_backbone.detection"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# The LazyConfig file: the YAML file's detector, optimizer and schedule


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LAZY = str(CONFIGS / "detection/voc/faster_rcnn_R_50_FPN_lazy.py")
YAML = "voc/faster_rcnn_R_50_FPN.yaml"
TINY = """model.backbone.bottom_up.depth=18 model.backbone.bottom_up.norm=BN
model.backbone.bottom_up.freeze_at=0 model.backbone.out_channels=16
dataloader.train.mapper.augmentations.0.short_edge_length=[64]
dataloader.test.mapper.augmentations.0.short_edge_length=64
dataloader.train.total_batch_size=2 dataloader.train.num_workers=0 dataloader.test.num_workers=0
train.device=cpu train.max_iter=2 train.init_checkpoint=''""".split()
REGIONS = """model.roi_heads.num_classes=2 model.roi_heads.batch_size_per_image=16
model.proposal_generator.post_nms_topk=[20,20]""".split()
HEAD = ["model.roi_heads.box_head.fc_dims=[8,16]"]
JITTER = """model.roi_heads.box_head.fc_dims=[16] model.roi_heads.box_head.conv_dims=[8]
model.roi_heads.mask_head.conv_dims=[8,8] model.backbone.norm=BN
dataloader.train.mapper.augmentations.0.target_height=64
dataloader.train.mapper.augmentations.0.target_width=64
dataloader.train.mapper.augmentations.1.crop_size=[64,64]
train.amp.enabled=False train.ddp.fp16_compression=False""".split()
BASELINES = {  # Detectron2's that are LazyConfigs alone: small model and data, losses
    "detection/coco/fcos_R_50_FPN_lazy.py": (
        [*TINY, "model.num_classes=2", "model.head.conv_dims=[16]", "model.head.norm="],
        {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"},
    ),
    "segmentation/coco/mask_rcnn_R_50_FPN_LSJ_lazy.py": (
        [*(word for word in TINY if "train.mapper" not in word), *REGIONS, *JITTER],
        {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"},
    ),
}


@pytest.fixture
def lazy():
    return LazyConfig.load(LAZY)


@pytest.fixture
def tiny(lazy, tiny_voc, tmp_path):
    """The config with a small model on the tiny data set."""
    for split in ("train", "test"):
        register_voc(f"lazy_{split}", str(tiny_voc), split, ["bar", "box"])
    names = ["dataloader.train.dataset.names=lazy_train", "dataloader.test.dataset.names=lazy_test"]
    words = [*TINY, *REGIONS, *HEAD, *names, f"train.output_dir={tmp_path}"]
    return LazyConfig.apply_overrides(lazy, words)


def test_every_reference_resolves_and_it_can_be_saved(lazy, tmp_path):
    OmegaConf.to_container(lazy, resolve=True)
    LazyConfig.save(lazy, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert again.model.backbone.bottom_up.depth == 50
    assert set(lazy) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    for keys in lazy:
        assert LazyConfig.load(LAZY, keys)


def test_same_detector_as_yaml(lazy, make_cfg, images):
    lazy.model.backbone.bottom_up.depth = 18
    cfg = make_cfg(YAML, MODEL__RESNETS__DEPTH=18, MODEL__ROI_HEADS__NUM_CLASSES=20)
    theirs, ours = build_model(cfg).eval(), instantiate(lazy.model).eval()
    assert isinstance(ours.backbone.bottom_up, PaperResNet)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name in ("pixel_mean", "pixel_std"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.input_format == theirs.input_format
    for head in (theirs.roi_heads, ours.roi_heads):  # random detectors find nothing above .05
        assert head.box_predictor.test_score_thresh == 0.05
        head.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        pairs = zip(theirs(images), ours(images), strict=True)
    for pair in pairs:
        expected, found = (output["instances"] for output in pair)
        assert len(expected) > 0
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.scores, expected.scores)


def test_same_training_settings_as_yaml(lazy, make_cfg):
    cfg = make_cfg(YAML)
    solver = cfg.SOLVER
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    lazy.optimizer.params.model = model
    optimizer, expected = instantiate(lazy.optimizer), build_optimizer(cfg, model)
    for key in ("lr", "momentum", "weight_decay"):
        groups = optimizer.param_groups, expected.param_groups
        found, wanted = ({p: g[key] for g in one for p in g["params"]} for one in groups)
        assert found == wanted, key
    multiplier, scheduler = instantiate(lazy.lr_multiplier), build_lr_scheduler(cfg, expected)
    for iteration in (0, 50, 99, 100, 11999, 12000, 15999, 16000, 17999):
        scheduler.last_epoch = iteration
        rate = lazy.optimizer.lr * multiplier(iteration / lazy.train.max_iter)
        assert rate == pytest.approx(scheduler.get_lr()[0]), iteration
    assert lazy.train.max_iter == solver.MAX_ITER
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.dataloader.train.total_batch_size == solver.IMS_PER_BATCH
    resize = lazy.dataloader.train.mapper.augmentations[0]
    assert resize.short_edge_length == list(cfg.INPUT.MIN_SIZE_TRAIN)
    assert resize.max_size == cfg.INPUT.MAX_SIZE_TRAIN
    assert tuple(lazy.dataloader.train.dataset.names) == cfg.DATASETS.TRAIN
    assert (lazy.dataloader.test.dataset.names,) == cfg.DATASETS.TEST
    assert lazy.model.input_format == lazy.dataloader.train.mapper.image_format == cfg.INPUT.FORMAT


@pytest.fixture
def do_train():
    """Detectron2's trainer of LazyConfigs, or the same hooks where its tools are not installed."""
    path = Path(detectron2.__file__).parents[1] / "tools" / "lazyconfig_train_net.py"
    if path.is_file():
        return partial(runpy.run_path(str(path))["do_train"], SimpleNamespace(resume=False))

    def train(config):
        data, how, folder = config.dataloader, config.train, config.train.output_dir
        config.optimizer.params.model = model = instantiate(config.model)
        trainer = SimpleTrainer(model, instantiate(data.train), instantiate(config.optimizer))
        saver = DetectionCheckpointer(model, folder, trainer=trainer)
        tested = partial(inference_on_dataset, model, instantiate(data.test))
        writers = defaults.default_writers(folder, how.max_iter)
        trainer.register_hooks(
            [
                hooks.LRScheduler(scheduler=instantiate(config.lr_multiplier)),
                hooks.PeriodicCheckpointer(saver, **how.checkpointer),
                hooks.EvalHook(how.eval_period, lambda: tested(instantiate(data.evaluator))),
                hooks.PeriodicWriter(writers, how.log_period),
            ]
        )
        trainer.train(0, how.max_iter)

    return train


def test_the_lazy_config_trains(tiny, tmp_path, do_train):
    """It trains, evaluates with our evaluator and writes a checkpoint."""
    torch.manual_seed(0)
    key, before = "backbone.bottom_up.res2.0.conv1.weight", instantiate(tiny.model).state_dict()
    torch.manual_seed(0)
    do_train(tiny)
    saved = torch.load(tmp_path / "model_final.pth")["model"]
    assert 0 < (saved[key] - before[key]).abs().max() < 0.01  # one of another seed is further away
    rows = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    found = {name: value for row in rows for name, value in row.items()}
    assert found["total_loss"] > 0 and "bbox/AP50" in found


@pytest.mark.parametrize("name", BASELINES)
def test_lazy_baselines_train(name, tiny_coco, tiny_voc, tmp_path, do_train, request):
    if "LSJ" in name:
        pytest.importorskip("shapely", reason="Detectron2 crops masks with it")
    small, losses = BASELINES[name]
    words = [*small, f"train.output_dir={tmp_path}"]
    for split, numbers in (("train", range(6)), ("test", range(6, 8))):
        data = f"{request.node.name}_{split}"
        file = tiny_coco(tmp_path / f"{split}.json", numbers)
        register_coco_instances(data, {}, file, str(tiny_voc / "JPEGImages"))
        words.append(f"dataloader.{split}.dataset.names='{data}'")
    do_train(LazyConfig.apply_overrides(LazyConfig.load(str(CONFIGS / name)), words))
    assert (tmp_path / "model_final.pth").is_file()
    rows = (tmp_path / "metrics.json").read_text().splitlines()
    assert losses | {"bbox/AP50"} <= {key for row in rows for key in json.loads(row)}


# Detectron2's own config files with our backbone


def test_retinanet_of_the_zoo_with_our_backbone():
    """Its anchors are a formula in its file."""
    file = Path(detectron2.__file__).parent / "model_zoo/configs/Base-RetinaNet.yaml"
    ours = ["MODEL.BACKBONE.NAME", "build_paper_resnet_p6p7_backbone", "MODEL.WEIGHTS", ""]
    cfg = load_config(str(file), [*ours, "MODEL.DEVICE", "cpu"])
    sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == sizes
    model = build_detector(cfg)
    assert model.anchor_generator.num_anchors == [9] * 5
    assert type(model.backbone.bottom_up).__name__ == "PaperResNet"


@pytest.mark.parametrize(
    "formula",
    ["__import__('os').getcwd()", "9**9**9**9", "[x for x in 3]", "(1).real", "y", "1 +", "[1/0]"],
)
def test_formulas_are_not_executed(tmp_path, formula):
    text = f'SIZES: !!python/object/apply:eval ["{formula}"]'
    (tmp_path / "x.yaml").write_text(f"MODEL:\n  ANCHOR_GENERATOR:\n    {text}\n")
    with pytest.raises(UsageError, match="is no formula of numbers and lists"):
        load_config(str(tmp_path / "x.yaml"), [])


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_that_are_lazy_configs_start(name, images):
    config = LazyConfig.load(str(CONFIGS / name))
    assert set(config) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    keys = [f"model.backbone.bottom_up.{word}" for word in ("depth=18", "norm=BN")]
    keys += ["model.backbone.norm=BN"] if "LSJ" in name else []
    model = instantiate(LazyConfig.apply_overrides(config, keys).model)
    for given in images:
        boxes = given["instances"].gt_boxes.tensor.tolist()
        outlines = [[[x, y, x1, y, x1, y1, x, y1]] for x, y, x1, y1 in boxes]
        given["instances"].gt_masks = PolygonMasks(outlines)
    losses = losses_of(model, images)
    assert set(losses) == BASELINES[name][1] and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    schedule = instantiate(config.lr_multiplier)
    assert schedule(0.5) == pytest.approx(1) and schedule(0.999) == pytest.approx(0.01)

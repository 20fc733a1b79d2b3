"""Checkpoints and data that would train or evaluate to something wrong without a word."""

import json

import pytest
import torch
from detectron2.modeling import build_model
from torchvision.models import resnet18

from resnet_backbone.detection import Checkpointer
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.data.arguments import set_up_data
from resnet_backbone.detection.data.coco import register_coco
from resnet_backbone.detection.engine.trainer import TolerantMapper, Trainer
from resnet_backbone.detection.inference.predictor import load_detector
from resnet_backbone.models import ResNet
from resnet_backbone.weights import WeightsError

CONFIG = "quickstart/faster_rcnn_R_18_FPN.yaml"


@pytest.fixture
def model(make_cfg, small):
    return build_model(make_cfg(CONFIG, **small))


def test_another_librarys_file_does_not_start_a_random_backbone(model, tmp_path):
    path = str(tmp_path / "torchvision.pth")
    torch.save(resnet18().state_dict(), path)
    with pytest.raises(WeightsError, match="torchvision.pth does not say which input"):
        Checkpointer(model).load(path, checkpointables=[])
    with pytest.raises(WeightsError, match='PIXEL_MEAN is .*; set INPUT.FORMAT "RGB" MODEL.PIX'):
        Checkpointer(model, preprocessing="torchvision").load(path, checkpointables=[])


def test_a_backbone_of_another_shape_is_refused(model, tmp_path):
    state = model.state_dict()
    key = next(key for key in state if key.endswith("res3.0.conv1.weight"))
    state[key] = state[key][:, :32]
    path = str(tmp_path / "narrow.pth")
    torch.save({"model": state}, path)
    with pytest.raises(WeightsError, match="res3.0.conv1.weight"):
        Checkpointer(model).load(path)


@pytest.mark.parametrize("folder, named", [("ImageNetPretrained/MSRA", ""), ("elsewhere", "msra")])
def test_pkl_files_of_known_origin_are_checked(make_cfg, small, tmp_path, folder, named):
    path = tmp_path / folder / "R-18.pth"
    path.parent.mkdir(parents=True)
    network = ResNet(18, out_features=["res5"])
    torch.save(
        {"model": {f"backbone.bottom_up.{k}": v for k, v in network.state_dict().items()}}, path
    )
    right = build_model(make_cfg("voc/faster_rcnn_R_18_FPN.yaml", **small))
    Checkpointer(right, preprocessing=named).load(str(path), checkpointables=[])
    wrong = build_model(make_cfg("voc/faster_rcnn_R_18_FPN.yaml", **small, INPUT__FORMAT="RGB"))
    with pytest.raises(WeightsError, match='INPUT.FORMAT "BGR"'):
        Checkpointer(wrong, preprocessing=named).load(str(path), checkpointables=[])


def test_other_classes_are_refused_unless_weights_only_start_a_training(model, tmp_path):
    Checkpointer(model, str(tmp_path), class_names=["cat", "dog"]).save("model")
    path = str(tmp_path / "model.pth")
    Checkpointer(model, class_names=["cat", "dog"]).load(path)
    Checkpointer(model, class_names=["cat", "cow"]).load(path, checkpointables=[])
    with pytest.raises(WeightsError, match="trained on the classes .*'dog'"):
        Checkpointer(model, class_names=["cat", "cow"]).load(path)


def test_a_checkpoint_without_statistics_is_not_evaluated(make_cfg, small, model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if "running_" not in k}
    path = str(tmp_path / "model.pth")
    torch.save({"model": state}, path)
    with pytest.raises(WeightsError, match="running_"):
        load_detector(make_cfg(CONFIG, **small, MODEL__WEIGHTS=path), model)


def test_plain_networks_refuse_zero_init():
    with pytest.raises(ValueError, match="needs shortcuts"):
        ResNet(18, shortcut="none", zero_init_residual=True)


def write_coco(path, names):
    image = {"id": 1, "file_name": "a.png", "width": 8, "height": 8}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    categories = [{"id": index, "name": name} for index, name in enumerate(names, start=1)]
    path.write_text(json.dumps({"images": [image], "annotations": [box], "categories": categories}))


def test_data_sets_with_other_class_orders_are_refused(make_cfg, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, classes in (("one", ["cat", "dog"]), ("two", ["dog", "cat"])):
        write_coco(tmp_path / f"{name}.json", classes)
        register_coco(f"refusals:{name}", str(tmp_path / f"{name}.json"), str(tmp_path))
    cfg = make_cfg(CONFIG, DATASETS__TRAIN=("refusals:one",), DATASETS__TEST=("refusals:two",))
    paths = dict(voc_root=None, coco_json=None, sem_seg=None, eval_only=False, bad_data="drop")
    arguments = type("Arguments", (), {"opts": [], **paths})()
    with pytest.raises(UsageError, match="same names in the same order"):
        set_up_data(cfg, arguments)


def test_an_image_that_breaks_during_training_is_left_out(make_cfg, tiny_voc):
    """The loader takes another one in its place (test_sampling.py); evaluation ends."""
    file = sorted((tiny_voc / "JPEGImages").iterdir())[0]
    good = {"file_name": str(file), "image_id": "good", "annotations": []}
    broken = {"file_name": str(file.with_name("gone.jpg")), "image_id": "gone", "annotations": []}
    mapper = TolerantMapper(make_cfg(CONFIG), True)
    assert mapper(dict(good))["image_id"] == "good"
    assert mapper(dict(broken)) is None
    with pytest.raises(OSError, match="gone.jpg"):
        TolerantMapper(make_cfg(CONFIG), False)(dict(broken))


def test_runs_of_an_ensemble_are_looked_for_before_training(make_cfg):
    cfg = make_cfg(CONFIG, RESNET_BACKBONE__TEST__ENSEMBLE=["nowhere"])
    with pytest.raises(UsageError, match="nowhere: no config.yaml there"):
        Trainer(cfg)

"""Whole detectors as TorchScript and ONNX, and optimize_for_inference on them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from torch import nn

from resnet_backbone import optimize_for_inference
from resnet_backbone.cli import export as tool
from resnet_backbone.cli.benchmark.turns import randomize_norms
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.inference import export
from resnet_backbone.fast.export import Mismatch

FPN, C4 = "coco/faster_rcnn_R_50_FPN.yaml", "coco/faster_rcnn_R_50_C4.yaml"
LAST = torch.channels_last


@pytest.fixture
def cfg(make_cfg, small):
    """Function (file) -> config of an R-18 detector of three classes."""

    own = dict(MODEL__RESNETS__DEPTH=18, MODEL__ROI_HEADS__NUM_CLASSES=3, MODEL__WEIGHTS="")
    own |= dict(MODEL__RPN__POST_NMS_TOPK_TEST=50)
    return lambda file, **keys: make_cfg(file, **own, **(small if "FPN" in file else {}), **keys)


def detector_of(cfg) -> nn.Module:
    """Random weights whose scores are far apart, so that rounding does not change their order."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    randomize_norms(model)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight, std=1.0)
    return model


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((3, 96, 160), (3, 130, 99))
    return [torch.randint(0, 256, size, generator=generator).float() for size in sizes]


def kernels(module: nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]


@pytest.mark.parametrize("file", [FPN, C4])
def test_detectron2_builds_channels_last(cfg, file):
    """Also without our Trainer, by Detectron2's own."""
    for model in (build_model(cfg(file)), DefaultTrainer.build_model(cfg(file))):
        parts = [model.backbone, model.roi_heads] if file == C4 else [model.backbone]
        for part in parts:
            assert all(kernel.is_contiguous(memory_format=LAST) for kernel in kernels(part))
    model = build_model(cfg(file, RESNET_BACKBONE__CHANNELS_LAST=False))
    assert all(kernel.is_contiguous() for kernel in kernels(model.backbone))


@pytest.mark.parametrize("file", [FPN, C4])
def test_optimized_detector(cfg, file):
    detector = detector_of(cfg(file))
    reference = export.run_detector(detector)
    plain = optimize_for_inference(detector, engine="eager")
    found = export.largest_difference(reference, export.run_detector(plain), pictures())
    assert max(found.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("file, masks", [(FPN, False), (FPN, True), (C4, False)])
def test_exports(cfg, file, masks, tmp_path):
    config = cfg(file, MODEL__MASK_ON=masks, MODEL__ROI_MASK_HEAD__CONV_DIM=8)
    config.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    config.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    detector = detector_of(config)
    model = export.SingleImageDetector(detector).eval()
    images = pictures()
    export.export_torchscript(model, images[0], tmp_path / "d.ts")
    export.export_onnx(model, images[0], tmp_path / "d.onnx")
    reference = export.run_detector(detector, model.names)
    for run in (torch.jit.load(tmp_path / "d.ts"), export.run_onnx(tmp_path / "d.onnx")):
        found = export.largest_difference(reference, run, images)
        assert list(found) == ["boxes", "scores"] + ["masks"] * masks
        assert max(found.values()) < 1e-4
        nothing = run(torch.zeros(3, 64, 64))
        assert nothing[0].shape[1] == 4 and len(nothing[0]) == len(nothing[1]) == len(nothing[2])


@pytest.mark.slow
def test_tool(cfg, tmp_path, run_command):
    """Of a run on a GPU that was evaluated with improvements, which are not exported."""
    own = dict(FLIP=True, SCALES=[64, 96], NMS="gaussian", BOX_REFINEMENT=True, PRECISION="float16")
    own |= dict(ENSEMBLE=["gone"])
    config = cfg(FPN, **{f"RESNET_BACKBONE__TEST__{key}": value for key, value in own.items()})
    detector = detector_of(config)
    torch.save({"model": detector.state_dict()}, tmp_path / "model_final.pth")
    text = config.dump().replace("DEVICE: cpu", "DEVICE: cuda")
    (tmp_path / "config.yaml").write_text(text)
    rng = np.random.default_rng(0)
    for index, size in enumerate(((96, 160, 3), (131, 99, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / f"{index}.png")
    arguments = ["--config-file", tmp_path / "config.yaml", "--output", tmp_path / "out" / "d"]
    arguments += ["--weights", tmp_path / "model_final.pth", "--images", tmp_path]
    arguments += ["INPUT.MAX_SIZE_TEST", "1234"]
    code, out, err = run_command(tool.main, *arguments)
    assert code == 0, err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"d.json", "d.onnx", "d.ts", "d_backbone.pt2"}
    assert out.count("largest difference") == 9  # boxes and scores twice, p2 ... p6
    facts = json.loads((tmp_path / "out" / "d.json").read_text())
    assert facts["input"]["channel_order"] == config.INPUT.FORMAT
    assert list(facts["outputs"]) == ["boxes", "classes", "scores"]
    assert all(facts["outputs"].values())
    assert facts["input"]["longer_side_at_most"] == 1234
    assert "class_names" in facts
    assert "RESNET_BACKBONE.TEST.NMS gaussian" in facts["not_exported"]
    assert len(facts["not_exported"]) == 6 == err.count("not exported: RESNET_BACKBONE.TEST.")
    props = pytest.importorskip("onnx").load(tmp_path / "out/d.onnx").metadata_props
    metadata = {one.key: one.value for one in props}
    assert {key: json.loads(value) for key, value in metadata.items()}.items() <= facts.items()
    assert {"input", "class_names"} <= metadata.keys()


def test_other_detections_are_seen():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20]])
    right = (boxes, torch.tensor([0, 1]), torch.tensor([0.9, 0.8]))
    image = [torch.zeros(3, 100, 50)]

    def check(*found):
        return export.largest_difference(lambda x: right, lambda x: found, image)

    assert check(*(value.flip(0) for value in right)) == {"boxes": 0, "scores": 0}
    assert check(boxes + 1, *right[1:])["boxes"] == pytest.approx(0.01)
    assert check(boxes * float("nan"), *right[1:])["boxes"] == float("inf")
    assert check(*right[:2], right[2] - 0.1)["scores"] == pytest.approx(0.1)
    with pytest.raises(Mismatch, match="or others"):
        check(boxes, torch.tensor([1, 1]), right[2])
    with pytest.raises(Mismatch, match="finds 2 objects .* graph 1"):
        check(*(value[:1] for value in right))
    with pytest.raises(ValueError, match="no objects"):
        none = tuple(value[:0] for value in right)
        export.largest_difference(lambda x: none, lambda x: none, image)


def test_other_meta_architectures_are_refused():
    with pytest.raises(UsageError, match="only GeneralizedRCNN"):
        export.SingleImageDetector(nn.Conv2d(3, 3, 1))

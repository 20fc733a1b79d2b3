"""Global context: what is pooled, what learns, and what is refused."""

import pytest
import torch
from detectron2.modeling import build_model

from resnet_backbone.detection import Checkpointer, with_global_context
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.inference.export import SingleImageDetector, export_torchscript
from resnet_backbone.detection.references import losses_of
from resnet_backbone.weights import WeightsError

FAMILIES = ("C4", "VGG", "FPN")
ON = dict(RESNET_BACKBONE__GLOBAL_CONTEXT=True)


@pytest.fixture
def build(make_family):
    def make(family, **keys):
        torch.manual_seed(0)
        return Trainer.build_model(make_family(family, **keys))

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_learns_through_both(build, images, family):
    """The gradient of each half of the two layers' input, and through it that of the backbone."""
    model = build(family, **ON, MODEL__BACKBONE__FREEZE_AT=0).train()
    losses = losses_of(model, images)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    sum(losses.values()).backward()
    gradient = model.roi_heads.box_predictor.cls_score.weight.grad
    width = gradient.shape[1] // 2
    assert gradient[:, :width].any() and gradient[:, width:].any()

    model.zero_grad()
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():  # only the context's half is read
        predictor.cls_score.weight[:, :width] = 0
        predictor.bbox_pred.weight.zero_()
    losses_of(model, images)["loss_cls"].backward()
    head = model.roi_heads.res5 if family == "C4" else model.roi_heads.box_head
    first = next(p for p in model.backbone.parameters() if p.dim() == 4)
    assert all(p.grad.any() for p in head.parameters() if p.dim() > 1)
    assert first.grad.any()


def test_names_of_the_heads(make_family):
    for family, name in (("C4", "ContextRes5ROIHeads"), ("VGG", "ContextROIHeads")):
        cfg = make_family(family, **ON)
        cfg.freeze()
        named = with_global_context(cfg)
        assert named.MODEL.ROI_HEADS.NAME == name and cfg.MODEL.ROI_HEADS.NAME != name
        assert with_global_context(named) is named
    off = make_family("FPN")
    assert with_global_context(off) is off


def test_a_switch_without_effect_is_refused(make_family):
    cfg = make_family("FPN", **ON)
    with pytest.raises(UsageError, match="StandardROIHeads has none"):
        build_model(cfg)  # Detectron2's own, which does not know the switch
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    with pytest.raises(UsageError, match="not for GeneralizedRCNN with MODEL.ROI_HEADS.NAME Casc"):
        with_global_context(cfg)
    off = make_family("FPN", MODEL__ROI_HEADS__NAME="ContextROIHeads")
    with pytest.raises(UsageError, match="needs RESNET_BACKBONE.GLOBAL_CONTEXT True"):
        build_model(off)
    masks = make_family("FPN", **ON, MODEL__MASK_ON=True)
    with pytest.raises(UsageError, match="MASK_ON"):
        Trainer.build_model(masks)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_without_context_are_refused(build, family, tmp_path):
    plain, context = build(family), build(family, **ON)
    Checkpointer(plain, str(tmp_path)).save("plain")
    Checkpointer(context, str(tmp_path)).save("context")
    message = "box_predictor.*another shape|another shape.*box_pred"
    for model, file in ((context, "plain.pth"), (plain, "context.pth")):
        with pytest.raises(WeightsError, match=message):
            Checkpointer(model).load(str(tmp_path / file))
    Checkpointer(context).load(str(tmp_path / "context.pth"))


@pytest.mark.parametrize("family", ["C4", "FPN"])
def test_an_exported_detector_sees_the_whole_of_other_images(build, family, tmp_path):
    """Traced on one image, run on a larger one with another number of proposals."""
    model = build(family, **ON, MODEL__RPN__POST_NMS_TOPK_TEST=40).eval()
    predictor = model.roi_heads.box_predictor
    torch.nn.init.normal_(predictor.cls_score.weight)
    predictor.test_score_thresh = 0.01
    images = [torch.rand(3, *size) * 255 for size in ((64, 96), (96, 160))]
    single = SingleImageDetector(model)
    export_torchscript(single, images[0], tmp_path / "detector.pt")
    exported = torch.jit.load(tmp_path / "detector.pt")
    for image in images:
        expected = single(image)
        assert len(expected[0])
        for ours, theirs in zip(exported(image), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

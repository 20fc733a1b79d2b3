"""Export of detectors to TorchScript and ONNX for any image size, checked against PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from resnet_backbone.detection.config import UsageError
from resnet_backbone.fast import optimize_for_inference
from resnet_backbone.fast.export import Mismatch, export_program, run_model, run_program
from resnet_backbone.fast.export import largest_difference as compare_maps
from resnet_backbone.fast.graphs import onnx_session

ONNX_OPSET = 17  # Detectron2's aligned RoIAlign needs at least 16
Detections = tuple[Tensor, ...]
Runner = Callable[[Tensor], Detections]


class SingleImageDetector(nn.Module):
    """A detector for one image with tensor input and outputs and its batch norms folded.

    Maps a float32 image (3, H, W) in 0..255, in the channel order of ``INPUT.FORMAT``, to the
    tensors in ``names``: ``boxes`` (n, 4), xyxy in pixels of that image, ``classes`` (n,),
    ``scores`` (n,), descending, and with a mask head ``masks`` (n, 1, 28, 28), probabilities within
    the box. Normalization is included; resizing (``INPUT.MIN_SIZE_TEST``) is left to the caller.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        if type(detector) is not GeneralizedRCNN:  # PanopticFPN derives from it
            raise UsageError(
                f"{type(detector).__name__} cannot be exported as a whole, only GeneralizedRCNN "
                "(Faster and Mask R-CNN)"
            )
        self.detector = optimize_for_inference(detector, engine="eager")
        has_masks = getattr(detector.roi_heads, "mask_on", False)
        self.names = ("boxes", "classes", "scores") + ("masks",) * has_masks

    def forward(self, image: Tensor) -> Detections:
        with patch_builtin_len():  # makes len() of a tensor traceable
            return run_detector(self.detector, self.names)(image)


def run_detector(detector: nn.Module, names: Sequence[str] = ()) -> Runner:
    """Returns a runner of the original detector, the reference for exported ones."""

    @torch.no_grad()
    def run(image: Tensor) -> Detections:
        found = detector.inference([{"image": image}], do_postprocess=False)[0]
        fields = (found.pred_boxes.tensor, found.pred_classes, found.scores)
        return (*fields, found.pred_masks) if "masks" in names else fields

    return run


def export_torchscript(model: SingleImageDetector, image: Tensor, path: str | os.PathLike) -> None:
    """Writes the detector as TorchScript, traced on an image of any size with detections."""
    torch.jit.trace(model, (image,), check_trace=False).save(str(path))


def export_onnx(
    model: SingleImageDetector,
    image: Tensor,
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the detector as ONNX with input ``image`` of any height and width.

    The metadata are entries of the file's ``metadata_props``.

    It uses PyTorch's TorchScript-based exporter: ``torch.export`` fails in Detectron2's
    ``find_top_rpn_proposals``, where a Python ``if`` depends on a tensor's values.
    """
    try:
        import onnx
    except ImportError as error:
        raise UsageError("ONNX export needs: pip install onnx onnxscript") from error
    axes = {name: {0: "detections"} for name in model.names}
    axes["image"] = {1: "height", 2: "width"}
    names = dict(input_names=["image"], output_names=list(model.names), dynamic_axes=axes)
    options = dict(dynamo=False, opset_version=ONNX_OPSET)
    torch.onnx.export(model, (image,), str(path), **names, **options)
    proto = onnx.load(str(path))
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, str(path))


def export_backbone(
    detector: nn.Module, path: str | os.PathLike, images: Iterable[Tensor]
) -> dict[str, float]:
    """Writes the detector's backbone, including its pyramid, as a ``torch.export`` program.

    The program takes normalized images (N, 3, H, W), with H and W multiples of
    ``size_divisibility``. Returns each map's largest relative difference from PyTorch's.
    """
    backbone = detector.backbone
    multiple = max(1, backbone.size_divisibility)
    torch.export.save(export_program(backbone, multiple=multiple), str(path))
    batches = [detector.preprocess_image([{"image": image}]).tensor for image in images]
    return compare_maps(run_model(backbone), run_program(path), batches)


def run_onnx(path: str | os.PathLike) -> Runner:
    """Returns a runner of a file written by :func:`export_onnx`, in onnxruntime on the CPU."""
    session = onnx_session(path)
    return lambda image: tuple(map(torch.from_numpy, session.run(None, {"image": image.numpy()})))


def largest_difference(
    reference: Runner, exported: Runner, images: Iterable[Tensor]
) -> dict[str, float]:
    """Returns the largest differences between exported detections and PyTorch's over some images.

    Each detection is compared with the exported one of its class whose box is nearest. The keys are
    "boxes" (difference of a coordinate as a fraction of the image's longer side), "scores" and, if
    present, "masks" (difference of a probability).

    Raises:
        Mismatch: the numbers of detections of a class differ.
        ValueError: no image has detections.
    """
    largest: dict[str, float] = {}
    for image in images:
        expected, found = reference(image), exported(image)
        if not torch.equal(*(values[1].sort().values for values in (expected, found))):
            raise Mismatch(
                f"PyTorch finds {len(expected[0])} objects in an image of {tuple(image.shape)}, "
                f"the exported graph {len(found[0])}, or others"
            )
        for one in zip(*expected, strict=True):
            for name, value in _apart(one, found, max(image.shape[1:])).items():
                largest[name] = max(largest.get(name, 0.0), value)
    if not largest:
        raise ValueError(
            "no objects were found in the images, so the export cannot be checked: give other "
            "images, or lower MODEL.ROI_HEADS.SCORE_THRESH_TEST"
        )
    return largest


def _apart(one: Sequence[Tensor], found: Detections, side: int) -> dict[str, float]:
    """Returns the differences of one detection from the nearest one of its class."""
    box, kind, score, *mask = one
    same = [values[found[1] == kind] for values in found]
    apart = (same[0] - box).abs().amax(1) / side
    nearest = int(apart.nan_to_num(nan=float("inf")).argmin())
    differences = {"boxes": apart[nearest], "scores": (same[2][nearest] - score).abs()}
    if mask:
        differences["masks"] = (same[3][nearest] - mask[0]).abs().max()
    return {name: float(value.nan_to_num(nan=torch.inf)) for name, value in differences.items()}

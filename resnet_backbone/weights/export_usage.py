"""How to use a written file: the lines to copy, with the transform that its weights need."""

from __future__ import annotations

from pathlib import Path

from resnet_backbone.weights.checkpoint import Checkpoint
from resnet_backbone.weights.export_configs import centre_crop, library_name
from resnet_backbone.weights.preprocessing import Preprocessing


def usage(checkpoint: Checkpoint, format: str, path: Path) -> str:
    """Lines of Python or YAML that load a file, and what the pixels must become."""
    lines = _WRITERS[format](checkpoint, path)
    return "\n".join([*lines, *_remarks(checkpoint, format)])


def _numbers(values) -> str:
    return "[" + ", ".join(f"{value:.9g}" for value in values) + "]"


def _transform(preprocessing: Preprocessing) -> str:
    resize, crop = centre_crop(preprocessing)
    return (
        f"transform = Compose([Resize({resize}), CenterCrop({crop}), ToTensor(), "
        f"Normalize({_numbers(preprocessing.mean)}, {_numbers(preprocessing.std)})])  # RGB, 0..1"
    )


def _ours(checkpoint: Checkpoint, path: Path) -> list[str]:
    return [
        "from resnet_backbone.weights import read_checkpoint",
        "from resnet_backbone.weights.inputs import InputNormalizer",
        "from resnet_backbone.weights.compare import build_network",
        f'checkpoint = read_checkpoint("{path}")',
        "network = build_network(checkpoint)",
        "normalize = InputNormalizer(checkpoint.preprocessing)  # of RGB bytes (N, 3, H, W)",
    ]


def _torchvision(checkpoint: Checkpoint, path: Path) -> list[str]:
    load = f'safetensors.torch.load_file("{path}")'
    if path.suffix == ".pth":
        load = f'torch.load("{path}", weights_only=True)'
    classes = checkpoint.model.num_classes
    arguments = "" if classes in (None, 1000) else f"num_classes={classes}"
    strict = "" if classes else ", strict=False"
    return [
        f"network = torchvision.models.{library_name(checkpoint)}({arguments})",
        f"network.load_state_dict({load}{strict})",
        _transform(checkpoint.preprocessing),
    ]


def _timm(checkpoint: Checkpoint, path: Path) -> list[str]:
    return [
        f'network = timm.create_model("local-dir:{path}", pretrained=True)',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))",
        "# which is " + _transform(checkpoint.preprocessing).removeprefix("transform = "),
    ]


def _hugging_face(checkpoint: Checkpoint, path: Path) -> list[str]:
    kind = "ResNetForImageClassification" if checkpoint.model.num_classes else "ResNetModel"
    return [
        f'network = transformers.{kind}.from_pretrained("{path}")',
        f'processor = transformers.AutoImageProcessor.from_pretrained("{path}")',
        "# which is " + _transform(checkpoint.preprocessing).removeprefix("transform = "),
    ]


def _detectron2(checkpoint: Checkpoint, path: Path) -> list[str]:
    preprocessing, model = checkpoint.preprocessing, checkpoint.model
    lines = [
        f'MODEL.WEIGHTS "{path}"',
        f"INPUT.FORMAT {preprocessing.channel_order}",
        f"MODEL.PIXEL_MEAN {_numbers(preprocessing.pixel_mean_255())}",
        f"MODEL.PIXEL_STD {_numbers(preprocessing.pixel_std_255())}",
    ]
    if model.name.startswith("resnet"):
        lines.append(f"MODEL.RESNETS.DEPTH {model.name.removeprefix('resnet')}")
        if model.options.get("norm") == "GN":
            lines.append("MODEL.RESNETS.NORM GN")
    if "res2.0.conv3.weight" in checkpoint.tensors:
        lines.append(f"MODEL.RESNETS.STRIDE_IN_1X1 {preprocessing.stride_in_1x1}")
    elif model.name.startswith("resnet"):
        lines.append("MODEL.RESNETS.RES2_OUT_CHANNELS 64")
    return lines


def _remarks(checkpoint: Checkpoint, format: str) -> list[str]:
    remarks = []
    preprocessing = checkpoint.preprocessing
    has_test = format in ("torchvision", "timm", "huggingface")
    if has_test and None in (preprocessing.resize_size, preprocessing.crop_size):
        remarks.append("# sizes of the test are the usual ones: the weights do not say theirs")
    if format == "torchvision" and checkpoint.model.num_classes is None:
        remarks.append("# the weights have no head: torchvision's stays as it is initialised")
    return remarks


_WRITERS = {
    "resnet_backbone": _ours,
    "torchvision": _torchvision,
    "timm": _timm,
    "huggingface": _hugging_face,
    "detectron2": _detectron2,
    "caffe2": _detectron2,
}

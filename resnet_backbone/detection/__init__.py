"""The Detectron2 plugin. Importing it registers the backbones and heads, and does nothing else."""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "resnet_backbone.detection needs Detectron2: pip install "
        "'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation, "
        "or run bash tools/setup_env.sh; the networks alone (resnet_backbone.models) work without"
    ) from error

from resnet_backbone.detection.checkpoint.checkpointer import Checkpointer
from resnet_backbone.detection.checkpoint.input_check import use_weights_input
from resnet_backbone.detection.config import add_resnet_backbone_config
from resnet_backbone.detection.inference.predictor import improve
from resnet_backbone.detection.modeling import build_detector
from resnet_backbone.detection.modeling.backbones import DeepLabResNet, PaperResNet, PaperVGG
from resnet_backbone.detection.modeling.heads import (
    PaperRes5ROIHeads,
    VGGBoxHead,
    with_global_context,
)
from resnet_backbone.detection.modeling.localization import ClassProposalNetwork, LocalizationRCNN


def setup_environment() -> None:
    """Lets ``DETECTRON2_ENV_MODULE=resnet_backbone.detection`` import this plugin everywhere."""


__all__ = [
    "Checkpointer",
    "ClassProposalNetwork",
    "DeepLabResNet",
    "LocalizationRCNN",
    "PaperRes5ROIHeads",
    "PaperResNet",
    "PaperVGG",
    "VGGBoxHead",
    "add_resnet_backbone_config",
    "build_detector",
    "improve",
    "use_weights_input",
    "with_global_context",
]

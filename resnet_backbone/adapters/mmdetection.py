"""A backbone for mmdetection: importing this module registers ``PaperResNet`` with mmengine.

In a config, ``custom_imports = dict(imports=["resnet_backbone.adapters.mmdetection"])`` and
``backbone=dict(type="PaperResNet", depth=50, ...)``. mmdetection, mmsegmentation and the other
OpenMMLab libraries fall back to mmengine's root registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_backbone.fast import build_model
from resnet_backbone.weights import Preprocessing, WeightsError, read_checkpoint
from resnet_backbone.weights.load import WrongStride, load_tensors
from resnet_backbone.weights.preprocessing import same_mean, same_std

STAGES = ("res2", "res3", "res4", "res5")
STYLES = {"caffe": True, "pytorch": False}  # stride_in_1x1
# Arguments of mmdetection's ResNet that this one accepts only with their default values.
DEFAULTS = dict(
    conv_cfg=None,
    dcn=None,
    stage_with_dcn=(False,) * 4,
    plugins=None,
    deep_stem=False,
    avg_down=False,
    with_cp=False,
    stem_channels=64,
    base_channels=64,
    pretrained=None,
)


@MODELS.register_module()
class PaperResNet(BaseModule):
    """ResNet-18/34/50/101/152 with the arguments of mmdetection's ``ResNet``.

    Maps images (N, in_channels, H, W) to a tuple of maps at strides 4, 8, 16, 32 for
    ``out_indices`` 0, 1, 2, 3.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_channels: channels of the image.
        num_stages: always 4, as in mmdetection's configs; ``out_indices`` decides what is built.
        out_indices: stages to return; later ones are not built.
        style: "caffe" puts a bottleneck's stride in its 1x1 convolution (the paper and its
            weights), "pytorch" in the 3x3 (torchvision).
        dilations: for each of the four stages, the dilation of its blocks. A dilated stage has
            stride 1, and ``strides`` must agree.
        frozen_stages: -1 for none, 0 for the stem, n for the stem and n stages.
        norm_cfg: ``type`` BN, SyncBN or GN, and ``requires_grad``.
        norm_eval: keep batch norms in evaluation mode during training.
        zero_init_residual: initialize the last gamma of each block to zero (mmdetection's default
            is True).
        data_preprocessor: the model's own ``data_preprocessor`` settings (``mean``, ``std``,
            ``bgr_to_rgb``), which the weights are checked against; required with weights.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)``, with ``preprocessing="msra"`` if the
            file does not state its own. FILE is any source of weights.
        **options: further arguments of :class:`~resnet_backbone.models.ResNet`, such as
            ``shortcut``. Other arguments of mmdetection's ``ResNet`` (``dcn``, ``with_cp``, ...)
            are accepted with their default values.

    Raises:
        ValueError: a value other than those above.
    """

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        num_stages: int = 4,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        style: str = "pytorch",
        dilations: Sequence[int] = (1, 1, 1, 1),
        frozen_stages: int = -1,
        norm_cfg: Mapping | None = None,
        norm_eval: bool = True,
        zero_init_residual: bool = False,
        data_preprocessor: Mapping | None = None,
        init_cfg: Mapping | None = None,
        **options,
    ):
        super().__init__(dict(init_cfg) if init_cfg else None)
        if num_stages != 4:
            raise ValueError(f"num_stages must be 4, not {num_stages}: see out_indices")
        if style not in STYLES:
            raise ValueError(f"style must be caffe or pytorch, not {style!r}")
        if not -1 <= frozen_stages <= 4:
            raise ValueError(f"frozen_stages must be -1 to 4, not {frozen_stages}")
        if not out_indices or not set(out_indices) <= set(range(len(STAGES))):
            raise ValueError(f"out_indices must be among 0, 1, 2, 3, not {tuple(out_indices)}")
        _take_defaults(options, dilations)
        norm = {"type": "BN", "requires_grad": True, **(norm_cfg or {})}
        if len(norm) > 2:
            raise ValueError(f"norm_cfg must have type and requires_grad, not {sorted(norm)}")
        self.network = build_model(
            f"resnet{depth}",
            in_channels=in_channels,
            stride_in_1x1=STYLES[style],
            dilations=dilations,
            norm=norm["type"],
            zero_init_residual=zero_init_residual,
            out_features=[STAGES[index] for index in sorted(out_indices)],
            **options,
        )
        self.out_indices = tuple(sorted(out_indices))
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.data_preprocessor = data_preprocessor
        for module in self._norms():
            module.requires_grad_(norm["requires_grad"])
        self.network.freeze(frozen_stages + 1)

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, (_BatchNorm, nn.GroupNorm))]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(images).values())

    def train(self, mode: bool = True) -> PaperResNet:
        """Sets training mode; with ``norm_eval``, batch norms stay in evaluation mode."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self._norms():
                module.eval()
        return self

    def init_weights(self) -> None:
        """Loads the weights of ``init_cfg``; without it, the network keeps its He initialization.

        Raises:
            WeightsError: the weights need another ``data_preprocessor`` or ``style``.
        """
        self._is_init = True
        if self.init_cfg is None:
            return
        if self.init_cfg.get("type") != "Pretrained" or "checkpoint" not in self.init_cfg:
            raise WeightsError('init_cfg must be dict(type="Pretrained", checkpoint=FILE)')
        weights = str(self.init_cfg["checkpoint"])
        checkpoint = read_checkpoint(weights, self.init_cfg.get("preprocessing", ""))
        check_data_preprocessor(checkpoint.preprocessing, self.data_preprocessor, weights)
        try:
            load_tensors(self.network, checkpoint, weights)
        except WrongStride as error:
            style = "caffe" if error.expected else "pytorch"
            raise WeightsError(f'{error}, that is with style="{style}"') from error


def _take_defaults(options: dict, dilations: Sequence[int]) -> None:
    """Removes arguments of mmdetection's ``ResNet`` from ``options``; only defaults are allowed."""
    strides = tuple(2 if index and rate == 1 else 1 for index, rate in enumerate(dilations))
    for name, expected in {"strides": strides, **DEFAULTS}.items():
        value = options.pop(name, expected)
        value = tuple(value) if isinstance(value, list) else value
        if value != expected and (name, value) != ("stem_channels", None):  # theirs: base_channels
            reason = f" with dilations {tuple(dilations)}" if name == "strides" else ""
            raise ValueError(
                f"PaperResNet has {name}={expected}{reason}, not {value}: leave {name} out, or "
                "use mmdetection's own ResNet"
            )


def data_preprocessor_for(preprocessing: Preprocessing) -> dict:
    """Returns the ``data_preprocessor`` settings for weights; mmdetection reads BGR in 0..255."""
    return dict(
        mean=[round(value, 3) for value in preprocessing.pixel_mean_255()],
        std=[round(value, 3) for value in preprocessing.pixel_std_255()],
        bgr_to_rgb=preprocessing.channel_order == "RGB",
    )


def check_data_preprocessor(
    preprocessing: Preprocessing, settings: Mapping | None, where: str
) -> None:
    """Checks that ``data_preprocessor`` produces the input that weights expect.

    Raises:
        WeightsError: another channel order, mean or std, or no ``settings`` to compare with.
    """
    needed = ", ".join(f"{k}={v}" for k, v in data_preprocessor_for(preprocessing).items())
    needed = f"{where} needs data_preprocessor=dict({needed})"
    if settings is None:
        raise WeightsError(
            f"{needed}: give it to the backbone as well as to the model, so that it can be checked"
        )
    if not (
        bool(settings.get("bgr_to_rgb")) == (preprocessing.channel_order == "RGB")
        and same_mean(settings.get("mean") or (), preprocessing.pixel_mean_255())
        and same_std(settings.get("std") or (), preprocessing.pixel_std_255())
    ):
        raise WeightsError(f"{needed}, but the model has {dict(settings)}")

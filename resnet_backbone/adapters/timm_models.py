"""The paper's networks in timm: importing this module registers paper_resnet18 and the others.

``timm.create_model(**from_checkpoint("FILE"), features_only=True)`` loads weights. timm's own
networks differ in two points: a bottleneck has its stride in the 3x3 convolution (here
``stride_in_1x1=True``, as in the paper, is the default), and the first block of a dilated stage
keeps the dilation of the stage before. VGG is not registered: timm's ``vgg16`` is the same network.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from resnet_backbone.adapters import rgb_checkpoint
from resnet_backbone.fast import build_model
from resnet_backbone.models.layers import checkpointed, init_he
from resnet_backbone.models.resnet import DILATIONS
from resnet_backbone.weights import WeightsError
from resnet_backbone.weights.export import refuse_other_inputs
from resnet_backbone.weights.keymaps.torchvision import timm_config

NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "plain18", "plain34")
STAGES = ("res2", "res3", "res4", "res5")


class PaperResNet(nn.Module):
    """A network of this package with timm's interface.

    Its children are conv1 (with norm and activation, stride 2), pool, res2 to res5, and the head
    ``global_pool``, ``drop``, ``fc``. The five feature levels are conv1 and res2 to res5. The key
    names are unique to this class, so a file of torchvision, timm or this package is refused: its
    preprocessing would be lost. Load it with :func:`from_checkpoint`.

    Args:
        name: one of ``NETWORKS``.
        num_classes: number of logits; 0 for no classifier.
        in_chans: channels of the input.
        global_pool: "avg" (the paper), "max", "avgmax", "catavgmax", or "" for none.
        output_stride: 32, 16 or 8.
        drop_rate: dropout before the classifier.
        device, dtype: of the parameters.
        **options: further arguments of :class:`~resnet_backbone.models.ResNet`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ):
        super().__init__()
        if output_stride not in DILATIONS:
            raise ValueError(f"output_stride must be 32, 16, or 8, not {output_stride}")
        with torch.device(device) if device is not None else nullcontext():
            network = build_model(
                name,
                in_channels=in_chans,
                dilations=DILATIONS[output_stride],
                out_features=STAGES,
                **options,
            ).to(dtype=dtype)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.conv1, self.pool = network.stem.conv1, network.stem.pool
        self.feature_info = [dict(num_chs=self.conv1.out_channels, reduction=2, module="conv1")]
        for stage in STAGES:
            self.add_module(stage, getattr(network, stage))
            channels, stride = network.features[stage]
            self.feature_info.append(dict(num_chs=channels, reduction=stride, module=stage))
        self.num_features = channels
        self.drop = nn.Dropout(drop_rate)
        self._make_head(global_pool)

    def _make_head(self, global_pool: str) -> None:
        self.global_pool, self.fc = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool
        )
        init_he(self.fc)
        self.fc.to(self.conv1.weight.device, self.conv1.weight.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Returns patterns that group parameters by depth, for layer-wise learning rates."""
        return dict(stem=r"^conv1", blocks=r"^res(\d+)" if coarse else r"^res(\d+)\.(\d+)")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self._make_head(self.global_pool.pool_type if global_pool is None else global_pool)

    def _run_stage(self, stage: str, x: Tensor) -> Tensor:
        blocks = getattr(self, stage)
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return blocks(x)
        for block in blocks:
            x = checkpointed(block, x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) -> res5, (N, num_features, H / stride, W / stride)."""
        x = self.pool(self.conv1(x))
        for stage in STAGES:
            x = self._run_stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """res5 -> logits (N, num_classes), or with ``pre_logits`` the classifier's input."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns feature levels, preceded by the last map unless ``intermediates_only``.

        Args:
            indices: levels to return; an integer n means the last n, None all five.
            norm: ignored, because there is no norm after the last stage.
            stop_early: stop after the deepest requested level.
            output_fmt: "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, not {output_fmt!r}")
        wanted, deepest = feature_take_indices(len(self.feature_info), indices)
        x = self.conv1(x)
        maps = [x] if 0 in wanted else []
        x = self.pool(x)
        for level, stage in enumerate(STAGES[:deepest] if stop_early else STAGES, start=1):
            x = self._run_stage(stage, x)
            if level in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the deepest level and, with them or if asked, the head."""
        wanted, deepest = feature_take_indices(len(self.feature_info), indices)
        for stage in STAGES[deepest:]:
            setattr(self, stage, nn.Sequential())
        if deepest == 0:
            self.pool = nn.Identity()
        self.num_features = self.feature_info[deepest]["num_chs"]
        if prune_head or deepest < len(STAGES):
            self.reset_classifier(0, "")
        return wanted

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **options):
        """Like ``nn.Module``'s, but raises WeightsError for other projects' keys, strict or not."""
        if any(key.startswith(("stem.", "layer1.", "resnet.")) for key in state_dict):
            raise WeightsError(
                "these weights have another project's key names, and their preprocessing would be "
                "lost: timm.create_model(**from_checkpoint(FILE)) reads them, see "
                "resnet_backbone.adapters.timm_models"
            )
        return super().load_state_dict(state_dict, strict, **options)

    def __prepare_scriptable__(self) -> nn.Module:
        """Returns the traced graph for TorchScript, which cannot compile the modules themselves."""
        return torch.fx.symbolic_trace(self)


def from_checkpoint(weights: str | os.PathLike, preprocessing: str = "") -> dict[str, Any]:
    """Returns arguments of ``timm.create_model`` for weights from any source.

    ``timm.create_model(**from_checkpoint("resnet50_msra.safetensors", "msra"), num_classes=20)``.
    timm adapts the weights to ``in_chans``, and drops the classifier if ``num_classes`` differs.
    The weights are converted exactly to RGB in 0..1, and ``pretrained_cfg`` has their mean, std,
    crop and interpolation.

    Args:
        weights: any source of ResNet or plain network weights.
        preprocessing: name of the weights' convention, for files that do not state it.

    Raises:
        WeightsError: unreadable weights, no preprocessing, a per-pixel mean image, another BN
            epsilon than PyTorch's, or a network not in ``NETWORKS``.
    """
    checkpoint = rgb_checkpoint(weights, preprocessing)
    model = checkpoint.model
    refuse_other_inputs(checkpoint, "timm")
    if model.name not in NETWORKS:
        raise WeightsError(
            f"{weights} holds a {model.name}; give one of {', '.join(NETWORKS)} (timm has a VGG)"
        )
    config = timm_config(checkpoint)["pretrained_cfg"]  # has JSON lists where timm has tuples
    overlay = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    overlay["pool_size"] = tuple(math.ceil(size / 32) for size in overlay["input_size"][1:])
    overlay["state_dict"] = {_key_in_timm(key): x.float() for key, x in checkpoint.tensors.items()}
    return {
        "model_name": f"paper_{model.name}",
        "pretrained": True,
        "pretrained_cfg_overlay": overlay,
        **{key: value for key, value in model.options.items() if key != "in_channels"},
    }


def _key_in_timm(key: str) -> str:
    return re.sub("^linear", "fc", key.removeprefix("stem."))


default_cfgs = generate_default_cfgs(
    {
        f"paper_{name}": dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            interpolation="bilinear",
            first_conv="conv1",
            classifier="fc",
            license="apache-2.0",
            paper_ids="arXiv:1512.03385",
        )
        for name in NETWORKS
    }
)


def _has_source(cfg: object) -> bool:
    values = cfg if isinstance(cfg, Mapping) else getattr(cfg, "__dict__", {})
    return any(values.get(key) for key in ("state_dict", "file", "url", "hf_hub_id"))


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options) -> nn.Module:
        sources = (options.get("pretrained_cfg_overlay"), options.get("pretrained_cfg"))
        if pretrained and not any(map(_has_source, sources)):
            raise WeightsError(
                f"paper_{name} has no weights to download: use timm.create_model("
                f'**from_checkpoint("FILE")) of {__name__}'
            )
        model = build_model_with_cfg(
            partial(PaperResNet, name), f"paper_{name}", pretrained, **options
        )
        model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
        return model

    create.__name__ = create.__qualname__ = f"paper_{name}"
    create.__doc__ = f"{name} of arXiv 1512.03385; arguments of :class:`PaperResNet`."
    return create


for _name in NETWORKS:
    register_model(_entry_point(_name))

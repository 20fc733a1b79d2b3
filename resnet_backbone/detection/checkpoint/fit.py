"""Which tensors of a checkpoint fit a detector: everything else is an error, not a warning."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_backbone.models import FrozenBatchNorm2d, StagedNetwork
from resnet_backbone.weights.preprocessing import INPUT_SETTINGS, WeightsError

logger = logging.getLogger(__name__)

# The layers of Detectron2's detectors whose size follows the number of classes.
CLASS_LAYERS = re.compile(
    r"roi_heads\.box_predictor\."
    r"|roi_heads\.mask_head\.(predictor|coarse_head\.prediction|point_head)\."
    r"|roi_heads\.keypoint_head\.score_lowres\."
    r"|head\.cls_score\."
    r"|sem_seg_head\.(predictor|coarse_sem_seg_head\.predictor|point_head)\."
)
# Buffers that a config gives, or that nothing reads.
NOT_WEIGHTS = re.compile(rf"pixel_(mean|std)$|.*\.(num_batches_tracked|{INPUT_SETTINGS})$")
RES5 = "roi_heads.res5."
BATCH_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


class Misfit(NamedTuple):
    """Keys of a model and of a file that do not go together; all empty where all fit."""

    missing: list[str]
    reshaped: dict[str, Tensor]  # key of the model -> the file's tensor
    unknown: list[str]


def compare(model: nn.Module, tensors: Mapping[str, Tensor]) -> Misfit:
    """What a model lacks, what has another shape, and what of a backbone it has no layer for.

    Args:
        tensors: under the model's keys. Detectron2's matching of names leaves those that it found
            no place for, also because of their shape, under the ends of keys.
    """
    own = {k: v for k, v in model.state_dict().items() if not NOT_WEIGHTS.match(k)}
    found = {key: _named(key, tensors) for key in own}
    reshaped = {k: v for k, v in found.items() if v is not None and v.shape != own[k].shape}
    missing = [key for key in own if key not in tensors and key not in reshaped]
    return Misfit(missing, reshaped, _unknown(model, own, tensors))


def _named(key: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    parts = key.split(".")
    names = (".".join(parts[index:]) for index in range(len(parts) - 1))
    return next((tensors[name] for name in names if name in tensors), None)


def _unknown(
    model: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> list[str]:
    """A deeper network's blocks; the stages and the head that a backbone leaves out are none."""
    found = []
    for prefix, network in _networks(model).items():
        left_out = tuple(f"{name}." for name in network.left_out)
        stages = re.compile(rf"({'|'.join(network.stage_names)})\.\d+\.")
        for key in tensors:
            name = key.removeprefix(prefix)
            ours = name != key or stages.match(name)
            known = key in own or NOT_WEIGHTS.match(key) or name.startswith(left_out)
            if ours and not known:
                found.append(key)
    return found


def _networks(model: nn.Module) -> dict[str, StagedNetwork]:
    """Prefix of the keys -> network of this package."""
    modules = model.named_modules()
    return {f"{name}.": part for name, part in modules if isinstance(part, StagedNetwork)}


def refuse_misfit(model: nn.Module, tensors: Mapping[str, Tensor], where: str, whole: bool) -> None:
    """Refuses a checkpoint that would leave layers as they are which it ought to fill.

    Args:
        whole: every tensor must be there, as for evaluation and resuming. Otherwise the backbone
            must be, layers that depend on the number of classes may have another shape, and
            other parts may be missing as a whole; a line says which then start at random.

    Raises:
        WeightsError: naming a tensor and its shapes.
    """
    misfit = compare(model, tensors)
    prefixes = (*(_networks(model) or ("backbone.",)), RES5)
    if not any(key.startswith(prefixes) for key in tensors):
        raise WeightsError(
            f"{where} has no tensor of this detector's backbone, whose names begin with "
            f"{prefixes[0]}; it has {min(tensors, default='none')}"
        )
    reshaped = [key for key in misfit.reshaped if whole or not CLASS_LAYERS.match(key)]
    if reshaped:
        key = reshaped[0]
        hint = ""
        if CLASS_LAYERS.match(key):
            hint = "; is the number of classes, or RESNET_BACKBONE.GLOBAL_CONTEXT, another?"
        raise WeightsError(
            f"{where}: {len(reshaped)} tensors are of another shape, such as {key}: "
            f"{tuple(misfit.reshaped[key].shape)}, this detector has "
            f"{tuple(model.state_dict()[key].shape)}{hint}"
        )
    if misfit.unknown:
        raise WeightsError(
            f"{where}: this detector's backbone has no {misfit.unknown[0]}; is it another depth?"
        )
    lacking = [key for key in misfit.missing if whole or key.startswith(prefixes)]
    if lacking:
        raise WeightsError(
            f"{where} lacks {len(lacking)} of this detector's tensors, such as {lacking[0]}; is it "
            "of another architecture, or weights of less than the whole detector?"
        )
    report_random([*misfit.missing, *misfit.reshaped], where)


def _part(key: str) -> str:
    """The part of a detector that a tensor belongs to: ``roi_heads.mask_head.``"""
    return ".".join(key.split(".")[:2]) + "."


def report_random(keys: list[str], where: str) -> None:
    """A line that names the parts whose tensors a file does not fill; none where it fills all."""
    if keys:
        parts = Counter(_part(key).rstrip(".") for key in keys)
        listed = ", ".join(f"{part} ({count} tensors)" for part, count in parts.items())
        logger.info(
            "%s: layers of another number of classes, or not in the file, start at random: %s",
            where,
            listed,
        )


def add_folded_statistics(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Completes a file whose batch norms are a scale and a shift, such as Detectron1's, in place.

    The statistics are folded into these: mean 0 and variance 1 - eps give the same function.

    Raises:
        WeightsError: see :func:`refuse_folded`.
    """
    if any(key.endswith("running_var") for key in tensors):
        return
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and f"{name}.weight" in tensors:
            tensors[f"{name}.running_mean"] = torch.zeros(len(tensors[f"{name}.weight"]))
            tensors[f"{name}.running_var"] = 1 - module.eps + tensors[f"{name}.running_mean"]
    refuse_folded(model, tensors, where)


def refuse_folded(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses to train batch norms whose statistics are folded into their scale and shift.

    Raises:
        WeightsError: every variance in the file is that of an identity, and norms are not frozen.
    """
    variances = [value for key, value in tensors.items() if key.endswith("running_var")]
    identity = FrozenBatchNorm2d(1).running_var
    if not variances or not all(torch.allclose(value, identity, 0, 1e-6) for value in variances):
        return
    if all(bool((v == 1).all()) for k, v in tensors.items() if k.endswith("norm.weight")):
        return  # a network that was never trained
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS[1:]):
            raise WeightsError(
                f"{where} has the statistics of its batch norms folded in, with which {name} "
                "cannot learn: set MODEL.RESNETS.NORM FrozenBN"
            )

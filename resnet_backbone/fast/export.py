"""Export to torch.export programs and ONNX files with dynamic batch size, height and width."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet_backbone.fast.engines import relative_difference
from resnet_backbone.fast.graphs import onnx_session
from resnet_backbone.fast.optimize import fold_bn
from resnet_backbone.models.layers import StagedNetwork
from resnet_backbone.weights.preprocessing import Preprocessing

EXAMPLE_SIZE = (2, 224, 288)  # batch, height, width: all different, and none is 1
DYNAMIC_DIMS = {0: "batch", 2: "height", 3: "width"}
RGB = "RGB"

Outputs = dict[str, Tensor]
Runner = Callable[[Tensor], Outputs]  # images -> outputs by name


class Mismatch(ValueError):
    """An exported file does not reproduce PyTorch's outputs."""


class NormalizedNetwork(nn.Module):
    """A network with its preprocessing, for RGB images (N, 3, H, W) in 0..255, uint8 or float.

    A per-pixel mean image is reduced to its channel means. Resizing is left to the caller.
    """

    def __init__(self, network: StagedNetwork, preprocessing: Preprocessing):
        super().__init__()
        self.network = network
        self.order = [RGB.index(channel) for channel in preprocessing.channel_order]
        mean, std = preprocessing.pixel_mean_255(), preprocessing.pixel_std_255()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", 1 / torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def out_features(self) -> tuple[str, ...]:
        return self.network.out_features

    def forward(self, images: Tensor) -> Tensor | Outputs:
        images = images.to(self.mean.dtype)[:, self.order]
        return self.network((images - self.mean) * self.scale)


def export_program(
    model: nn.Module, *, in_channels: int = 3, dtype: torch.dtype = torch.float32, multiple: int = 1
) -> torch.export.ExportedProgram:
    """Exports a network with its batch norms folded, for ``torch.export.save``.

    Batch size, height and width are dynamic; height and width must exceed the largest stride.

    Args:
        model: a classifier, a backbone, or a :class:`NormalizedNetwork`. It is not modified.
        dtype: of the images: torch.float32, or torch.uint8 for a :class:`NormalizedNetwork`.
        multiple: divisor of height and width, such as a feature pyramid's ``size_divisibility``.
    """
    model = fold_bn(copy.deepcopy(model).cpu().eval().requires_grad_(False))
    batch, height, width = EXAMPLE_SIZE
    example = torch.zeros(batch, in_channels, height, width, dtype=dtype)
    sizes = {dim: torch.export.Dim.DYNAMIC for dim in DYNAMIC_DIMS}
    if multiple > 1:
        sizes[0] = torch.export.Dim("batch")
        for dim in (2, 3):  # with fewer units, the pyramid's last level could be one pixel
            sizes[dim] = multiple * torch.export.Dim(f"{DYNAMIC_DIMS[dim]}_units", min=3)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=(sizes,))


def output_names(model: nn.Module) -> list[str]:
    """Returns the names of an exported graph's outputs: the backbone's features, or "logits"."""
    return list(model.out_features) or ["logits"]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    program: torch.export.ExportedProgram | None = None,
) -> None:
    """Writes a network as ONNX: input ``images``, outputs named as in :func:`output_names`.

    Args:
        metadata: entries of the file's ``metadata_props``.
        program: by default :func:`export_program` of the model, for three channels in float32.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("ONNX export needs: pip install onnx onnxscript") from error
    found = torch.onnx.export(
        program or export_program(model),
        (),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=output_names(model),
    )
    proto = found.model_proto
    _name_dimensions(proto.graph)
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto)
    Path(path).write_bytes(proto.SerializeToString())


def _name_dimensions(graph) -> None:
    """Renames symbols such as s77 to batch, height and width, also in expressions of sizes."""
    dims = graph.input[0].type.tensor_type.shape.dim
    symbols = {dims[index].dim_param: name for index, name in DYNAMIC_DIMS.items()}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda m: symbols.get(m[0], m[0]), dim.dim_param)


def run_model(model: Callable[[Tensor], Tensor | Outputs]) -> Runner:
    """Returns a runner of a PyTorch model."""

    @torch.no_grad()
    def run(images: Tensor) -> Outputs:
        found = model(images)
        return found if isinstance(found, dict) else {"logits": found}

    return run


def run_onnx(path: str | os.PathLike) -> Runner:
    """Returns a runner of an ONNX file; see :func:`onnx_session`."""
    session = onnx_session(path)
    names = [value.name for value in session.get_outputs()]
    image = session.get_inputs()[0].name

    def run(images: Tensor) -> Outputs:
        try:
            found = session.run(None, {image: images.contiguous().numpy()})
        except Exception as error:  # onnxruntime's own types
            size = "x".join(map(str, images.shape))
            reason = str(error).splitlines()[0]
            raise Mismatch(f"onnxruntime cannot run images of {size}: {reason}") from error
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    return run


def run_program(path: str | os.PathLike) -> Runner:
    """Returns a runner of a file written by ``torch.export.save``."""
    return run_model(torch.export.load(str(path)).module())


def largest_difference(
    reference: Runner, exported: Runner, batches: Iterable[Tensor]
) -> dict[str, float]:
    """Returns the largest difference of each output over some batches.

    It is relative to the reference's largest magnitude. Mismatch: names or shapes differ.
    """
    largest: dict[str, float] = {}
    for images in batches:
        expected, found = reference(images), exported(images)
        if found.keys() != expected.keys():
            raise Mismatch(f"outputs are {list(found)} in the exported graph, not {list(expected)}")
        for name, value in expected.items():
            ours, theirs = tuple(found[name].shape), tuple(value.shape)
            if ours != theirs:
                at = f"for images {tuple(images.shape)}"
                raise Mismatch(f"{name} has shape {ours}, and {theirs} in PyTorch, {at}")
            difference = relative_difference(found[name], value)
            largest[name] = max(largest.get(name, 0.0), difference)
    return largest


def input_facts(preprocessing: Preprocessing, normalized: bool) -> dict:
    """Describes the expected input of an exported graph, for JSON and ONNX metadata."""
    where = "in the graph" if normalized else "by the caller"
    names = ("channel_order", "value_range", "mean", "std")
    facts = {"channel_order": RGB, "value_range": 255}
    if not normalized:
        facts = {name: getattr(preprocessing, name) for name in names}
    return {"layout": "NCHW", "normalization": where, **facts}

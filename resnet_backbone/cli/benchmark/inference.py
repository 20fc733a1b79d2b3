"""Inference of a classifier: torchvision's model, ours, and other runtimes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from resnet_backbone import build_model
from resnet_backbone.classification.networks import NetworkSpec
from resnet_backbone.cli.benchmark.interleaved import randomize_norms
from resnet_backbone.fast import optimize_for_inference
from resnet_backbone.fast.export import export_onnx, run_onnx
from resnet_backbone.weights.keymaps import from_torchvision

Forward = Callable[[Tensor], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def reference_model(name: str) -> nn.Module:
    """torchvision's model in its default form, with statistics that make each norm count."""
    torch.manual_seed(0)
    model = NetworkSpec(f"torchvision/{name}", 1000).build().eval()
    randomize_norms(model)
    return model


def our_model(name: str, reference: nn.Module) -> nn.Module:
    """The same network of ours, as :func:`build_model` gives it, with the reference's weights."""
    options = {} if name.startswith("vgg") else {"stride_in_1x1": False}
    model = build_model(name, **options).eval()
    model.load_state_dict(from_torchvision(reference.state_dict()))
    return model


def candidates(
    name: str, dtypes: list[str], compiled: bool, device: torch.device
) -> dict[str, Forward]:
    """Name -> forward pass on normalised float32 images; the first is the reference."""
    reference = reference_model(name)
    ours = our_model(name, reference).to(device)
    found: dict[str, Forward] = {
        f"torchvision {name}, fp32": reference.to(device),
        "ours, fp32, as built": ours,
    }
    for dtype in dtypes:
        found[f"ours, {dtype}, optimized"] = optimize_for_inference(ours, dtype=DTYPES[dtype])
        if compiled:
            found[f"ours, {dtype}, optimized, compile"] = optimize_for_inference(
                ours, dtype=DTYPES[dtype], compile=True
            )
    return found


def runtimes(name: str, dtypes: list[str], threads: int) -> dict[str, Forward]:
    """The same network exported to ONNX, in onnxruntime (fp32) and OpenVINO, on the CPU.

    Raises:
        ValueError: a runtime, or onnx, is not installed.
    """
    try:
        import onnxruntime  # noqa: F401
        import openvino
    except ImportError as error:
        raise ValueError("--runtimes needs: pip install onnxscript onnxruntime openvino") from error
    model = our_model(name, reference_model(name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path)
        run = run_onnx(path, threads)
        content = path.read_bytes()
    found = {"onnxruntime, fp32": lambda images: run(images)["logits"]}
    for dtype in dtypes:
        found[f"OpenVINO, {dtype}"] = _openvino(openvino, content, dtype, threads)
    return found


def _openvino(openvino, content: bytes, dtype: str, threads: int) -> Forward:
    precision = {"fp32": "f32", "bf16": "bf16"}[dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    network = openvino.Core().read_model(content)
    compiled = openvino.compile_model(network, "CPU", settings)
    return lambda images: torch.from_numpy(np.array(compiled(images.numpy())[0]))

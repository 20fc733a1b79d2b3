"""Networks as graphs of PyTorch's compiler, OpenVINO and onnxruntime."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Run = Callable[[Tensor], Any]
HINTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "f32"}
ONNX_OPSET = 17


class GraphNetwork(nn.Module):
    """A float32 copy of a network, as graphs have it: maps (N, H, W, C), and a tuple of outputs.

    Its maps are then channels_last, as those of the parts around it.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network).float()
        self.spec = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs, self.spec = tree_flatten(self.network(channels_second(x)))
        return tuple(map(channels_at_end, outputs))

    def rebuild(self, arrays: Any) -> Any:
        outputs = [channels_second(torch.from_numpy(array)) for array in arrays]
        return tree_unflatten(outputs, self.spec)


def channels_at_end(x: Tensor) -> Tensor:
    """Returns a view (N, H, W, C) of maps (N, C, H, W), and other tensors as they are."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


def channels_second(x: Tensor) -> Tensor:
    """Reverses :func:`channels_at_end`."""
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x


def graph_input(x: Tensor) -> np.ndarray:
    """Returns a :class:`GraphNetwork`'s input; channels_last float32 maps are not copied."""
    return channels_at_end(x).float().contiguous().numpy()


def build_compiled(network: nn.Module, x: Tensor) -> Run:
    compiled = torch.compile(network.__call__)
    config = importlib.import_module("torch._inductor.config")

    def run(x: Tensor) -> Any:
        with config.patch(freezing=True):  # read at the first call of each shape
            return compiled(x)

    return run


def build_openvino(network: nn.Module, x: Tensor) -> Run:
    plain = GraphNetwork(network)
    return run_openvino(plain, openvino_graph(plain, x), x.dtype)


def build_int8(network: nn.Module, samples: list[Tensor]) -> Run:
    """Quantizes a trained network with NNCF."""
    nncf = importlib.import_module("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)  # its handlers may be others' too
    plain = GraphNetwork(network)
    graph = openvino_graph(plain, samples[0])
    dataset = nncf.Dataset([graph_input(sample) for sample in samples])
    graph = nncf.quantize(graph, dataset, subset_size=len(samples))
    return run_openvino(plain, graph, torch.int8)


@cache
def openvino_core() -> Any:
    """Returns the process's only Core, which is never destroyed.

    Each Core of OpenVINO 2026.4 sets a stack for signal handlers. Destroying a Core before a later
    one leaves a dangling pointer to that stack, and the next signal crashes the process.
    """
    return importlib.import_module("openvino").Core()


def openvino_graph(plain: GraphNetwork, x: Tensor) -> Any:
    openvino, x = importlib.import_module("openvino"), channels_at_end(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about sizes, which are dynamic
        return openvino.convert_model(plain, example_input=x.float(), input=free_sizes(x))


def run_openvino(plain: GraphNetwork, graph: Any, dtype: torch.dtype) -> Run:
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # several processes would share the first cores
    }
    compiled = openvino_core().compile_model(graph, "CPU", settings)
    local = threading.local()  # threads that share a request get each other's results

    def run(x: Tensor) -> Any:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return plain.rebuild(local.request.infer(graph_input(x), share_inputs=True).values())

    return run


def build_onnxruntime(network: nn.Module, x: Tensor) -> Run:
    plain, file, x = GraphNetwork(network), io.BytesIO(), channels_at_end(x)
    axes = {"x": [axis for axis, size in enumerate(free_sizes(x)) if size < 0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # dynamo=False traces: torch.export would need to know what sizes are multiples of.
        torch.onnx.export(
            plain, (x,), file, dynamo=False, opset_version=ONNX_OPSET, input_names=["x"],
            dynamic_axes=axes,
        )  # fmt: skip
    session = onnx_session(file.getvalue(), torch.get_num_threads())
    return lambda x: plain.rebuild(session.run(None, {"x": graph_input(x)}))


def onnx_session(model: str | os.PathLike | bytes, threads: int = 0) -> Any:
    """Returns an ``onnxruntime.InferenceSession`` on the CPU for a file or its content.

    0 threads leaves the number to onnxruntime. Raises ValueError if onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("running ONNX files needs: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def free_sizes(x: Tensor) -> list[int]:
    """Returns the shape of a graph's input with -1 for dynamic axes: all but the channels."""
    channels = 3 if x.dim() == 4 else 1
    return [size if axis == channels else -1 for axis, size in enumerate(x.shape)]

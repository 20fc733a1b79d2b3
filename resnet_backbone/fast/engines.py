"""Inference engines: which can run here, which is fastest, and whether its outputs are right."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resnet_backbone.fast.graphs import (
    Run,
    build_compiled,
    build_int8,
    build_onnxruntime,
    build_openvino,
    openvino_core,
)

logger = logging.getLogger(__name__)
AUTO = "auto"
PACKAGES = {  # required by each engine
    "eager": (),
    "compile": (),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
}
ENGINES = (AUTO, *PACKAGES)
# Tolerated difference from PyTorch at the same precision, relative to an output's largest value.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
CALIBRATION = 128  # inputs kept per part
CALIBRATION_REGIONS = 64  # regions kept per input of a head
ROUNDS = 3  # timing rounds of "auto"
BUILDERS: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "compile": build_compiled,
    "openvino": build_openvino,
    "onnxruntime": build_onnxruntime,
}


def why_not(engine: str, dtype: torch.dtype, device: torch.device | None = None) -> str:
    """Returns why an engine cannot run here and how to fix it, or "" if it can."""
    if dtype == torch.int8 and engine != "openvino":
        return "has no int8: use openvino"
    needed = (*PACKAGES[engine], "nncf") if dtype == torch.int8 else PACKAGES[engine]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: pip install 'resnet_backbone[export]'"
    if PACKAGES[engine] and device is not None and device.type != "cpu":
        return f"runs on CPUs, and the images are on {device.type}: use eager or compile"
    if engine == "onnxruntime" and dtype != torch.float32:
        return f"has float32 on CPUs, not {str(dtype)[6:]}: use another engine"
    if engine != "eager" and dtype not in (*BOUNDS, torch.int8):
        return f"has no {str(dtype)[6:]}: use eager"
    if engine == "openvino" and dtype not in (torch.float32, torch.int8):
        name = {torch.bfloat16: "BF16", torch.float16: "FP16"}[dtype]
        if name not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return f"has no {name} on this CPU: use float32"
    return ""


def check_engine(engine: str, dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Raises ValueError if an engine is unknown or cannot run here, or not on a device."""
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
    engine = "openvino" if engine == AUTO and dtype == torch.int8 else engine
    problem = engine != AUTO and why_not(engine, dtype, device)
    if problem:
        raise ValueError(f"engine {engine} {problem}")


class InferenceNetwork(nn.Module):
    """A network run by an engine at a given precision, without gradients.

    The engine is built at the first call, for the layout of that input, and its outputs are
    compared with PyTorch's. If they differ by more than rounding, or the engine fails then or
    later, a warning is logged and PyTorch runs the network. "auto" builds every engine that can run
    here and picks the fastest, timed by the best of three calls. ``network.engine`` and the log
    (level INFO) name the choice.

    Images, the first argument, may have any size and precision. Outputs have the precision of the
    images, or float32 for integer images. Missing attributes are looked up on the network.

    Args:
        network: cast to `dtype` in place. With int8 it runs in float32 and keeps its inputs until
            :meth:`quantize` is called.
        engine: see :func:`resnet_backbone.optimize_for_inference`.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, engine: str = "eager"):
        super().__init__()
        self.samples: list[Tensor] | None = [] if dtype == torch.int8 else None
        self.network = network if dtype == torch.int8 else network.to(dtype)
        self.asked = engine
        self._forget()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def _forget(self) -> None:
        self.engine, self._run = "", None  # until the next call
        if self.asked == "eager":
            self.engine, self._run = "eager", self.network.__call__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def quantize(self) -> None:
        """Quantizes the network to int8 for OpenVINO, with ranges from the inputs seen so far.

        Raises:
            ValueError: there were no inputs.
        """
        if not self.samples:
            raise ValueError("int8 needs calibration inputs, on which every part is run")
        self._run, self.engine, self.samples = build_int8(self.network, self.samples), "int8", None

    def _refuse_int8(self, what: str) -> None:
        if self.engine == "int8":
            raise TypeError(f"an int8 network is not {what}: optimize the original again")

    def __getstate__(self) -> dict:
        self._refuse_int8("copied or saved")
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()

    def _apply(self, fn, recurse: bool = True) -> InferenceNetwork:
        self._refuse_int8("moved or cast")
        super()._apply(fn, recurse)
        if self.asked != "eager":  # engines hold the parameters, which _apply changes in place
            self.network = copy.deepcopy(self.network)
        self._forget()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if self.asked != "eager":
            raise RuntimeError(
                "the weights of an engine are constants of its code: load into the original and "
                "optimize that"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def forward(self, x: Tensor, *args, **kwargs) -> Any:
        if not isinstance(x, Tensor):
            raise TypeError(f"the first argument is a tensor of images, not a {type(x).__name__}")
        result = x.dtype if x.is_floating_point() else torch.float32
        x = cast(x, self.dtype)
        if args or kwargs or not x.numel() or torch.jit.is_tracing():
            return cast(self.network(x, *args, **kwargs), result)
        if self.samples is not None:
            if len(self.samples) < CALIBRATION:
                self.samples.append(x[:CALIBRATION_REGIONS].float())
            return cast(self.network(x), result)
        if self._run is None:
            if self.asked != "eager":
                self.network(x)  # wrong input raises here, and no engine is blamed
            self._run = self._start(x)
        if self.engine == "eager":
            return cast(self.network(x), result)
        try:
            return cast(self._run(x), result)
        except Exception as error:  # engines may raise anything, perhaps only at another size
            found = self.network(x)  # wrong input raises, and the engine stays
            logger.warning("engine %s %s; PyTorch runs the network", self.engine, failure(error))
            self.engine, self._run = "eager", self.network.__call__
            return cast(found, result)

    def extra_repr(self) -> str:
        return f"{self.dtype}, engine={self.engine or self.asked}"

    def _start(self, x: Tensor) -> Run:
        runs: dict[str, Run] = {"eager": self.network.__call__}
        for name in BUILDERS if self.asked == AUTO else [self.asked]:
            problem = why_not(name, self.dtype, x.device) or self._try(name, x, runs)
            if problem and self.asked == AUTO:
                logger.info("engine %s %s", name, problem)
            elif problem:
                logger.warning("engine %s %s; PyTorch runs the network", name, problem)
        if self.asked == AUTO:
            seconds = time_runs(runs, x)
            self.engine = min(seconds, key=seconds.__getitem__)
            told = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
            logger.info("engine %s for %s: %s", self.engine, tuple(x.shape), told)
        else:
            self.engine = self.asked if self.asked in runs else "eager"
        return runs[self.engine]

    def _try(self, name: str, x: Tensor, runs: dict[str, Run]) -> str:
        """Builds an engine into `runs`; returns why it cannot be used, or ""."""
        try:
            runs[name] = BUILDERS[name](self.network, x)
            difference = relative_difference(runs[name](x), self.network(x))
        except Exception as error:  # engines may raise anything
            runs.pop(name, None)
            return failure(error)
        if difference <= BOUNDS[self.dtype]:
            return ""
        del runs[name]
        return f"differs from PyTorch by {difference:.2g} of the largest value"


def failure(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"fails ({type(error).__name__}: {lines[0] if lines else ''})"


def relative_difference(found: Any, expected: Any) -> float:
    """Returns the largest difference relative to an output's largest value; inf for NaN."""
    parts = []
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        a, b = a.detach().double(), b.detach().double()
        difference = (a - b).abs().max()
        if difference:  # NaN, too
            difference = (difference / b.abs().max()).nan_to_num(torch.inf, torch.inf)
        parts.append(float(difference))
    return max(parts)


def time_runs(runs: dict[str, Run], x: Tensor) -> dict[str, float]:
    """Returns each engine's seconds per call, the best of several alternating rounds."""
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = _now(x)
            run(x)
            seconds[name] = min(seconds[name], _now(x) - start)
    return seconds


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Casts all floating-point tensors in nested dicts, lists and tuples."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, value)

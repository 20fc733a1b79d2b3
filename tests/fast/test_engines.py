"""Engines of optimize_for_inference: PyTorch's outputs at any size, or a warning and PyTorch."""

import copy
import logging
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from drawn_networks import assert_close, network, unfolded
from torch import nn

from resnet_backbone import optimize_for_inference
from resnet_backbone.fast import engines
from resnet_backbone.fast.graphs import graph_input

SIZES = ((2, 3, 32, 32), (1, 3, 48, 32), (3, 3, 40, 64))
BF16 = torch.bfloat16


def has(engine: str, dtype: torch.dtype = torch.float32):
    problem = engines.why_not(engine, dtype)
    return pytest.param(engine, dtype, marks=pytest.mark.skipif(bool(problem), reason=problem))


RUNTIMES = [has("openvino"), has("openvino", BF16), has("onnxruntime")]


@pytest.mark.parametrize("engine, dtype", RUNTIMES)
@pytest.mark.parametrize("options", [{"num_classes": 5}, {"out_features": ("res2", "res4")}])
def test_an_engine_gives_pytorchs_outputs_at_any_size(engine, dtype, options):
    model = network(**options)
    fast = optimize_for_inference(model, dtype=dtype, engine=engine)
    with torch.no_grad():
        eager = optimize_for_inference(model, dtype=dtype, engine="eager")
        for size in SIZES:
            images = torch.randn(size)
            assert_close(fast(images), unfolded(model, images), 1e-4 if dtype != BF16 else 0.03)
            assert_close(fast(images), eager(images), engines.BOUNDS[dtype])
    maps = [value for value in fast(images).values()] if "out_features" in options else []
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in maps)
    assert fast.engine == engine and "network" in dict(fast.named_children())
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_close(copied(images), fast(images), 1e-6)
    with pytest.raises(RuntimeError, match="constants of its code"):
        fast.load_state_dict(fast.state_dict())


@pytest.mark.parametrize("engine, dtype", [has("openvino")])
def test_other_inputs_of_an_engine(engine, dtype):
    """Channels last, doubles, and none at all."""
    model = network(num_classes=5)
    fast = optimize_for_inference(model, dtype=dtype, engine=engine)
    images = torch.randn(2, 3, 32, 48)
    assert_close(fast(images.to(memory_format=torch.channels_last)), unfolded(model, images))
    assert fast(images.double()).dtype == torch.float64
    assert fast(images[:0]).shape == (0, 5)


@pytest.mark.parametrize("engine, dtype", RUNTIMES)
def test_threads_get_their_own_results(engine, dtype):
    fast = optimize_for_inference(network(num_classes=5), dtype=dtype, engine=engine)
    images = torch.randn(4, 1, 3, 32, 32)
    wanted = [fast(one) for one in images]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            assert all(map(torch.equal, threads.map(fast, images), wanted))


@pytest.mark.parametrize("engine, dtype", RUNTIMES)
def test_wrong_input_leaves_an_engine_on(engine, dtype):
    """Before it is built, and after."""
    fast = optimize_for_inference(network(num_classes=5), dtype=dtype, engine=engine)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="channels"):
            fast(torch.zeros(1, 1, 32, 32))
        fast(torch.zeros(1, 3, 32, 32))
        assert fast.engine == engine


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize("engine, dtype", [has("openvino")])
def test_an_engine_leaves_its_thread_on_all_cores(engine, dtype):
    """Processes beside one another would otherwise all run on the first core."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    fast, images = optimize_for_inference(network(), engine=engine), torch.randn(8, 3, 256, 256)
    fast(images)  # builds the engine
    runner = threading.Thread(target=lambda: [fast(images) for _ in range(5)])
    runner.start()
    seen = set()
    while runner.is_alive():
        try:
            seen.add(frozenset(os.sched_getaffinity(runner.native_id)))
        except ProcessLookupError:  # it has just ended
            break
    assert seen == {frozenset(cores)}


def test_channels_last_inputs_are_not_copied():
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert np.shares_memory(graph_input(images), images.numpy())


def test_auto_runs_pytorch_on_nan_and_doubles():
    images = torch.full((1, 3, 32, 32), torch.nan)
    fast = optimize_for_inference(network(num_classes=5), engine="auto")
    assert fast(images).isnan().all() and fast.engine == "eager"
    double = optimize_for_inference(network(num_classes=5), engine="auto").double()
    assert double(torch.rand(1, 3, 32, 32)).isfinite().all() and double.engine == "eager"


@pytest.mark.parametrize("place", [0, 1])
def test_nan_is_a_difference(place):
    right = [torch.ones(2), torch.ones(2)]
    wrong = [torch.full((2,), torch.nan) if n == place else x for n, x in enumerate(right)]
    for pair in ((right, wrong), (wrong, right), (wrong, wrong)):
        assert engines.relative_difference(*pair) == torch.inf
    assert engines.relative_difference(torch.ones(1).double() + 1e-9, torch.ones(1)) > 1e-10


class Traced(nn.Module):
    """A network that is another one in a graph."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) * (2 if torch.jit.is_tracing() else 1)


@pytest.mark.parametrize("engine, dtype", [has("openvino"), has("onnxruntime")])
@pytest.mark.parametrize("told", ["differs from PyTorch by 1 of", "fails (OSError: no memory)"])
def test_what_an_engine_cannot_run_is_said(engine, dtype, told, caplog, monkeypatch):
    if "fails" in told:
        build = MagicMock(side_effect=OSError("no memory\nmore"))
        monkeypatch.setitem(engines.BUILDERS, engine, build)
    model, images = Traced(), torch.ones(1, 3, 8, 8)
    fast = optimize_for_inference(model, dtype=dtype, engine=engine)
    with caplog.at_level(logging.WARNING):
        assert_close(fast(images), model(images))
    assert f"engine {engine} {told}" in caplog.text
    assert "PyTorch runs the network" in caplog.text and fast.engine == "eager"


def test_an_engine_that_fails_at_another_size(caplog, monkeypatch):
    def build(module, x):
        return lambda other: module(other) if other.shape == x.shape else 1 / 0

    monkeypatch.setitem(engines.BUILDERS, "compile", build)
    model = network(num_classes=5)
    fast = optimize_for_inference(model, engine="compile")
    assert_close(fast(torch.ones(1, 3, 32, 32)), unfolded(model, torch.ones(1, 3, 32, 32)))
    assert fast.engine == "compile" and not caplog.text
    images = torch.randn(2, 3, 48, 32)
    assert_close(fast(images), unfolded(model, images))
    assert fast.engine == "eager" and "engine compile fails (ZeroDivisionError" in caplog.text


def test_auto_takes_the_fastest_of_those_that_are_right(monkeypatch, caplog):
    """Of engines with given times: the fastest one is wrong, the next one is taken."""
    seconds = {"eager": 0.05, "compile": 0.01, "openvino": 0.02, "onnxruntime": 0.0}
    wrong = "onnxruntime"
    builders = {name: lambda module, x: module.__call__ for name in seconds}
    builders[wrong] = lambda module, x: lambda x: module(x) + 1
    monkeypatch.setattr(engines, "BUILDERS", builders)
    monkeypatch.setattr(engines, "why_not", lambda *_: "")
    monkeypatch.setattr(engines, "time_runs", lambda runs, x: {key: seconds[key] for key in runs})
    fast, images = optimize_for_inference(network(num_classes=5)), torch.randn(1, 3, 32, 32)
    with caplog.at_level(logging.INFO):
        assert_close(fast(images), unfolded(network(num_classes=5), images))
    assert fast.engine == "compile" and "engine=compile" in repr(fast)
    assert f"engine {wrong} differs" in caplog.text
    assert "engine compile for (1, 3, 32, 32): eager 50.0 ms, compile 10.0 ms, op" in caplog.text


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="engine 'tensorrt' is not one of auto, eager, compile"):
        optimize_for_inference(network(), engine="tensorrt")
    with pytest.raises(ValueError, match="onnxruntime has float32 on CPUs, not bfloat16"):
        optimize_for_inference(network(), engine="onnxruntime", dtype=BF16)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs openvino: pip install .resnet_backbone.export.."):
        optimize_for_inference(network(), engine="openvino")
    with pytest.raises(ValueError, match="needs openvino, nncf: pip install"):
        optimize_for_inference(network(), dtype=torch.int8)


@pytest.mark.parametrize("engine, dtype", [has("openvino", torch.int8)])
def test_int8_is_calibrated_on_given_inputs(engine, dtype):
    model = network(num_classes=5)
    images = [torch.randn(4, 3, 32, 32) for _ in range(4)]
    with pytest.raises(ValueError, match="int8 needs calibration inputs"):
        optimize_for_inference(model, dtype=dtype, engine=engine)
    handlers = pytest.importorskip("nncf").common.logging.nncf_logger.handlers
    levels = [handler.level for handler in handlers]
    fast = optimize_for_inference(model, dtype=dtype, calibration=images)
    assert [handler.level for handler in handlers] == levels  # pytest's are among them
    with torch.no_grad():
        for x in (images[0], torch.randn(1, 3, 48, 40)):
            expected, found = unfolded(model, x), fast(x)
            assert 0 < (found - expected).abs().max() < 0.2 * expected.abs().max()
    assert fast.engine == "int8"
    for change in (copy.deepcopy, nn.Module.double):
        with pytest.raises(TypeError, match="optimize the original again"):
            change(fast)


@pytest.mark.parametrize("engine, dtype", [has("openvino")])
def test_signals_after_an_engine_is_gone(engine, dtype):
    """OpenVINO sets a stack for signal handlers, which must not be that of a destroyed object."""
    code = """
import gc, signal, torch
from resnet_backbone import optimize_for_inference

fast = [optimize_for_inference(torch.nn.Conv2d(3, 4, 3), engine="openvino") for _ in range(3)]
assert all(one(torch.ones(1, 3, 8, 8)).shape == (1, 4, 6, 6) for one in fast)
while fast:
    del fast[0]
    gc.collect()
answered = []
signal.signal(signal.SIGUSR1, lambda *_: answered.append(1))
signal.raise_signal(signal.SIGUSR1)
print(len(answered), "answered")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1 answered\n"), done.stderr

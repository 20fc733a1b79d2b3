"""Mutated weights files through the readers: `python fuzz_readers.py COUNT SEED FOLDER`.

Prints how many were read and how many refused. Exits with status 1 for any exception but
WeightsError, any sign of execution, and a file that takes more than five seconds; memory is limited
to 1.5 GB above what the imports need, and a native crash is seen by whoever started it.
"""

import collections
import json
import os
import pickle
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torchvision.models  # noqa: F401  imports are no execution by a file
from safetensors.torch import save_file

from resnet_backbone.models import build_model
from resnet_backbone.weights import PREPROCESSINGS, WeightsError, read_checkpoint, save_weights
from resnet_backbone.weights.readers import read_tensors

EXECUTION = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec")
PAYLOADS = [
    b"cos\nsystem\n(S'touch CANARY'\ntR.",
    b"cposix\nsystem\n\x8c\x0ctouch CANARY\x85R",
    b'c__builtin__\neval\n(S\'open("CANARY", "w")\'\ntR.',
    b"\x8c\x08builtins\x8c\x04exec\x93\x8c\x16open('CANARY','w').close\x85R.",
    b"(S'touch CANARY'\nios\nsystem\n.",
    b"ctorch.storage\n_load_from_bytes\n(C\x00tR",
    b"\x82\x01",
    b"Pstorage\n",
    b"r\xff\xff\xff\xff",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x96\xff\xff\xff\xff\xff\x00\x00\x00",
    b"\x8a\xff",
    b"2" * 50,
    b"]" * 50,
]


OURS = "ours.safetensors"  # a whole checkpoint


def state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn1.running_mean": torch.randn(4, generator=generator).half(),
        "bn1.num_batches_tracked": torch.tensor(7),
        "fc.weight": torch.randn(2, 6, generator=generator).t().bfloat16(),
    }


def write_seeds(folder: Path) -> list[Path]:
    """One small file of each kind that is read."""
    tensors = {key: value.contiguous() for key, value in state_dict().items()}
    arrays = {key: value.float().numpy() for key, value in tensors.items()}
    arrays["b"] = np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3))
    save_file(tensors, folder / "seed.safetensors", {"resnet_backbone.schema": "1"})
    wrapped = {"state_dict": collections.OrderedDict(state_dict()), "epoch": 3, "best": 0.5}
    torch.save(wrapped, folder / "zip.pth")
    torch.save(wrapped, folder / "plain.pth", _use_new_zipfile_serialization=False)
    for protocol in (2, 4, 5):
        content = {"model": arrays, "__author__": "torchvision", "lr": np.float32(0.1)}
        with open(folder / f"{protocol}.pkl", "wb") as file:
            pickle.dump(content, file, protocol)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "seed.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.manual_seed(0)
    network = build_model("cifar_resnet8", 2, shortcut="B").half()
    save_weights(network, folder / OURS, PREPROCESSINGS["msra"], run="a run")
    return sorted(folder.iterdir())


def mutate(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """A damaged copy: one to four changes of one of six kinds."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, kind = rng.randrange(min(len(data), rng.choice((4000, 10**9))) + 1), rng.randrange(6)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[place % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            end = len(data) if rng.random() < 0.3 else place + rng.randrange(1, 40)
            del data[place:end]
        elif kind == 3:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[place:place] = other[start : start + rng.randrange(1, 200)]
        elif kind == 4:
            data[place:place] = rng.choice(PAYLOADS)
        else:
            data[place : place + 8] = rng.choice((b"\xff" * 8, bytes(8), b"\x00" * 7 + b"\x01"))
    return bytes(data)


def watch(event: str, arguments: tuple) -> None:
    """An audit hook: ends the process if anything is executed, imports of modules aside."""
    if not watching or not event.startswith(EXECUTION):
        return
    name = getattr(arguments[0], "co_filename", "<string>")
    if event != "exec" or name == "<string>":
        print(f"executed: {event} {arguments}", *traceback.format_stack(), sep="\n")
        sys.stdout.flush()
        os._exit(1)


watching = False


def main(count: int, seed: int, folder: Path) -> None:
    global watching
    rng, results = random.Random(seed), collections.Counter()
    os.chdir(folder)
    seeds = write_seeds(folder)
    contents = [path.read_bytes() for path in seeds]
    for path in seeds:
        read_checkpoint(path) if path.name == OURS else read_tensors(path)
    repr(torch.ones(1))  # as above, imports all that reading and its errors need
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**29,) * 2)
    sys.addaudithook(watch)
    watching, slowest = True, 0.0
    for number in range(count):
        path, content = rng.choice(list(zip(seeds, contents, strict=True)))
        victim = folder / f"victim{''.join(path.suffixes[-3:])}"
        victim.write_bytes(mutate(rng, content, contents))
        started = time.perf_counter()
        signal.alarm(5)
        try:
            read_tensors(victim)
            if path.name == OURS:
                read_checkpoint(victim, "msra")
            results["read"] += 1
        except WeightsError as error:
            assert len(str(error).splitlines()) == 1 and victim.name in str(error), error
            results["refused"] += 1
        except BaseException:
            print(f"file {number} of seed {seed}, from {path.name}: {victim}")
            raise
        signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - started)
        assert not (folder / "CANARY").exists(), f"{victim} was executed"
    watching = False  # modules are imported at exit
    print(json.dumps({**results, "slowest_ms": round(1000 * slowest)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

"""Candidates take turns within one run; speed is compared within each turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

Run = Callable[[], int]  # processes some images and says how many


def interleave(runs: dict[str, Run], repeats: int, wait: Callable[[], None]) -> dict[str, list]:
    """Images/s of each candidate in each repeat, after one turn each that is not counted."""
    names = list(runs)
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(repeats + 1) * len(names), desc="measuring", unit="turn") as bar:
        for repeat in range(repeats + 1):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                wait()
                start = time.perf_counter()
                images = runs[name]()
                wait()
                if repeat:
                    rates[name].append(images / (time.perf_counter() - start))
                bar.update()
    return rates


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarize(rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row for each candidate; the first one is the reference."""
    reference = next(iter(rates.values()))
    return [
        {
            "name": name,
            "images_per_s": spread(values),
            "ratio": spread([v / r for v, r in zip(values, reference, strict=True)]),
            "measurements": values,
        }
        for name, values in rates.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':34}{'images/s':>10}  {'range':19}{'ratio':>7}  range")
    for row in rows:
        speed, ratio = row["images_per_s"], row["ratio"]
        speeds = f"{speed['low']:.1f} ... {speed['high']:.1f}"
        ratios = f"{ratio['low']:.2f} ... {ratio['high']:.2f}"
        print(
            f"{row['name']:34}{speed['median']:10.1f}  {speeds:19}{ratio['median']:7.2f}  {ratios}"
        )


def random_images(shape: tuple[int, ...], channels_last: bool, device) -> torch.Tensor:
    """Normalised images, (N, C, H, W)."""
    images = torch.randn(shape, device=device)
    return images.to(memory_format=torch.channels_last) if channels_last else images


def waiter(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done what it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference, as a fraction of the largest expected magnitude.

    0 where both are 0 everywhere, infinite where the expected one alone is.
    """
    found, expected = found.float(), expected.float()
    difference = (found - expected).abs().max()
    return float(difference / expected.abs().max()) if difference else 0.0


@torch.no_grad()
def randomize_norms(model: nn.Module) -> None:
    """Statistics, scales and shifts of all batch norms that tell a misplaced one.

    Scales of about a half keep the maps of a deep network bounded.
    """
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.uniform_(0.4, 0.6)
            module.bias.normal_(0, 0.1)

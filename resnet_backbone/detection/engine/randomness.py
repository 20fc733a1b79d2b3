"""Random numbers that depend on the seed and the place in a run alone, so runs go on exactly."""

from __future__ import annotations

import random

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

# The first word of a seed: what its random numbers are for.
ORDER, SUBSET, AUGMENTATION, REPLACEMENT, STEP = range(5)


def seed_of(cfg: CfgNode) -> int:
    """``SEED``; where it is negative one that is drawn, the same for all processes."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    """A copy of a config with another ``SEED``, frozen if it is."""
    copy = cfg.clone()
    copy.defrost()
    copy.SEED = seed
    if cfg.is_frozen():
        copy.freeze()
    return copy


def make_rng(purpose: int, *place: int) -> np.random.Generator:
    """A generator for one purpose at one place, such as (ORDER, seed, epoch)."""
    return np.random.default_rng([purpose, *place])


def seed_everything(purpose: int, *place: int) -> None:
    """Seeds torch on every device, numpy and random: Detectron2 draws from all three.

    Args:
        purpose: one of the constants of this module.
        place: non-negative numbers, the seed of the run first.
    """
    words = np.random.SeedSequence([purpose, *place]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))

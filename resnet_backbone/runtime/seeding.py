"""Random numbers that depend on the seed and the place in a run alone.

No generator's state outlives an iteration or a sample. So a resumed run has no state to restore,
and the number of workers, or what was drawn before, changes nothing.
"""

from __future__ import annotations

import random

import numpy as np
import torch

# The first word of a seed: what its random numbers are for.
ORDER, SUBSET, AUGMENTATION, REPLACEMENT, STEP = range(5)


def make_rng(*words: int) -> np.random.Generator:
    """A generator for one purpose at one place, such as (ORDER, seed, epoch).

    Args:
        words: non-negative; equal words give equal numbers, on every machine.
    """
    return np.random.default_rng(list(words))


def seed_everything(*words: int) -> None:
    """Seeds torch on every device, numpy and random; words as in :func:`make_rng`."""
    state = np.random.SeedSequence(list(words)).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))

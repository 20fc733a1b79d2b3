"""Checkpoints, whole or not there: weights with their preprocessing, and the run's state."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from resnet_backbone.classification.networks import NetworkSpec, load_exactly, save_network
from resnet_backbone.runtime.files import whole_file
from resnet_backbone.runtime.run_folder import METRICS
from resnet_backbone.weights import Preprocessing, WeightsError

logger = logging.getLogger(__name__)

WEIGHTS, AVERAGED, STATE = "model.safetensors", "averaged.safetensors", "state.pt"
FOLDER, DAMAGED = "checkpoints", ".damaged"
LEFT_BEHIND = (".*.tmp", ".partial-*")  # what a kill can leave; the second by earlier versions


class Checkpoints:
    """The folder ``checkpoints/<iteration>/`` of a run.

    Each is written under another name and renamed when it is on the disk, so a kill at any moment
    leaves the earlier ones and at most a folder that the next start removes.

    Args:
        folder: of the run.
        spec, preprocessing: written into the weights.
        keep: newest checkpoints that stay.
        keep_every: iterations whose multiples stay for good; 0: none.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: NetworkSpec,
        preprocessing: Preprocessing,
        *,
        keep: int = 2,
        keep_every: int = 0,
    ):
        self.folder = Path(folder) / FOLDER
        self.spec, self.preprocessing = spec, preprocessing
        self.keep, self.keep_every = keep, keep_every

    def save(
        self, iteration: int, model: nn.Module, state: dict, averaged: nn.Module | None = None
    ) -> Path:
        """Writes the checkpoint of an iteration, unless it is there already.

        Args:
            averaged: the network with averaged weights, written beside the others so that it can
                be used before the run ends.
        """
        final = self.folder / f"{iteration:08d}"
        if final.exists():
            return final
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = (self.spec, self.preprocessing, self.folder.resolve().parent.name)
        with whole_file(final) as partial:
            partial.mkdir()
            save_network(partial / WEIGHTS, model, *facts)
            if averaged is not None:
                save_network(partial / AVERAGED, averaged, *facts)
            torch.save(state, partial / STATE)
        self._remove_old()
        return final

    def iterations(self) -> list[int]:
        """Iterations that have a checkpoint, rising."""
        return iterations_in(self.folder)

    def _remove_old(self) -> None:
        for iteration in self.iterations()[: -self.keep]:
            if not self.keep_every or iteration % self.keep_every:
                shutil.rmtree(self.folder / f"{iteration:08d}", ignore_errors=True)

    def load_latest(self, model: nn.Module, clean: bool = True) -> dict | None:
        """Loads the newest checkpoint's weights; its state, or None if there is no checkpoint.

        ``preprocessing`` is then what these weights expect.

        A damaged checkpoint is passed over with a warning that names it, and set aside once an
        older one was loaded.

        Args:
            clean: whether to remove and set aside; for one process of a run.

        Raises:
            WeightsError: there are checkpoints, and none can be read.
        """
        for pattern in LEFT_BEHIND if clean else ():
            for left in self.folder.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)
        damaged: list[Path] = []
        found = self.iterations()
        for iteration in reversed(found):
            folder = self.folder / f"{iteration:08d}"
            try:
                state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
                self.preprocessing = load_exactly(model, folder / WEIGHTS)
                for other in damaged if clean else ():
                    os.replace(other, other.with_name(other.name + DAMAGED))
                return state
            except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
                damaged.append(folder)
                problem = " ".join(str(error).split())
                logger.warning("%s cannot be used (%s); trying an older one", folder, problem)
        if found:
            raise WeightsError(f"{self.folder}: none of {len(found)} checkpoints can be read")
        return None


def iterations_in(folder: Path) -> list[int]:
    """Iterations with a complete checkpoint in a folder of checkpoints, rising."""
    names = [path.name for path in folder.glob("*")] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def has_checkpoint(run: str | Path) -> bool:
    """Whether a run folder has a checkpoint to go on from."""
    return bool(iterations_in(Path(run) / FOLDER))


def holds_run(run: str | Path) -> bool:
    """Whether a folder has checkpoints or metrics that a new run would mix with."""
    return has_checkpoint(run) or (Path(run) / METRICS).exists()


def newest_weights(run: str | Path) -> str:
    """The weights of a run's newest checkpoint that evaluations use; empty if there is none."""
    found = iterations_in(Path(run) / FOLDER)
    if not found:
        return ""
    newest = Path(run) / FOLDER / f"{found[-1]:08d}"
    averaged = newest / AVERAGED
    return str(averaged if averaged.is_file() else newest / WEIGHTS)

"""Checkpoints that are whole or not there, and never hold numbers that are not finite."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from resnet_backbone.detection.checkpoint.checkpointer import Checkpointer
from resnet_backbone.runtime.files import put_in_place, write_text

LAST = "last_checkpoint"  # a file in the run folder that names its newest checkpoint
PARTIAL = ".partial"


class AtomicWriter(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` whose files appear under their names when they are whole.

    Attributes:
        marks_last: whether what is saved is what ``--resume`` goes on from.
    """

    marks_last = True

    def save(self, name: str, **kwargs: Any) -> None:
        """As fvcore's, which writes in place.

        Raises:
            OSError: the file cannot be written; the one that it would replace is there.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: one.state_dict() for key, one in self.checkpointables.items()}
        content = {"model": self.model.state_dict(), **states, **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            torch.save(content, path + PARTIAL)
            put_in_place(path + PARTIAL, path)
        except (OSError, RuntimeError) as error:  # the second is of PyTorch's file writer
            with suppress(FileNotFoundError):
                os.remove(path + PARTIAL)  # a full disk has its room back
            cause = " ".join(str(error).split())
            raise OSError(f"{path} cannot be written ({cause})") from error
        if self.marks_last:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(os.path.join(self.save_dir, LAST), last_filename_basename)


class AtomicCheckpointer(Checkpointer, AtomicWriter):
    """:class:`Checkpointer` that writes as :class:`AtomicWriter`."""

    def __init__(self, *args: Any, marks_last: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.marks_last = marks_last


def find_last_checkpoint(folder: str) -> str:
    """The checkpoint from which a run goes on; "" where there is none."""
    mark = os.path.join(folder, LAST)
    if not os.path.isfile(mark):
        return ""
    with open(mark, encoding="utf-8") as file:
        return os.path.join(folder, file.read().strip())


def refuse_not_finite(model: nn.Module) -> None:
    """All processes must call it.

    Raises:
        FloatingPointError: on every process, if any has a weight or statistic that is NaN or
            infinite.
    """
    state = model.state_dict().items()
    found = next((key for key, value in state if not value.isfinite().all()), "")
    bad = [key for key in comm.all_gather(found) if key]
    if bad:
        raise FloatingPointError(f"the weights are not finite ({bad[0]}), no checkpoint is written")

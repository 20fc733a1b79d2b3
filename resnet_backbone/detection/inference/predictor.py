"""A trained detector for one image at a time, and readers of images and videos for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from PIL import UnidentifiedImageError
from torch import nn

from resnet_backbone.detection.checkpoint.input_check import require_weights, with_weights_input
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.inference.testing import for_testing


class UnreadableError(ValueError):
    """An image or a video that cannot be read; the message names it."""


class Predictor:
    """Detectron2's DefaultPredictor with checked weights and bf16 mixed precision on CPUs.

    ``RESNET_BACKBONE.TEST`` adds the paper's improvements. Without them, in fp32, it gives the
    detections that DefaultPredictor gives for the same config and weights.
    Weights that belong to other input settings, and weights of less than the whole detector (a
    backbone alone, other classes), are refused: the detections would be noise.

    Args:
        cfg: a detector's config; ``MODEL.WEIGHTS`` names its checkpoint and ``SOLVER.AMP.ENABLED``
            turns bf16 on where ``MODEL.DEVICE`` is cpu. It is not changed: with
            ``RESNET_BACKBONE.WEIGHTS_INPUT`` "set", a copy follows the weights.

    Raises:
        UsageError: ``MODEL.WEIGHTS`` is empty.
        WeightsError: the weights cannot be read, lack parameters or have them in another shape,
            or were trained on other input than the config gives them.
    """

    def __init__(self, cfg: CfgNode):
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise UsageError(f"INPUT.FORMAT is RGB or BGR, not {cfg.INPUT.FORMAT!r}")
        self.cfg = with_weights_input(cfg)
        detector = Trainer.build_model(self.cfg)
        load_detector(self.cfg, detector)
        detector.eval()
        self.model = for_testing(self.cfg, detector)
        shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self.resize = ResizeShortestEdge([shortest, shortest], longest)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> dict:
        """Detects objects in one image.

        Args:
            image: BGR, uint8, (H, W, 3), of any size; it is resized by ``INPUT.MIN_SIZE_TEST``.

        Returns:
            The detector's output, ``{"instances": Instances}`` with ``pred_boxes`` (xyxy in pixels
            of `image`), ``scores``, ``pred_classes``.
        """
        height, width = image.shape[:2]
        if self.cfg.INPUT.FORMAT == "RGB":
            image = image[:, :, ::-1]
        resized = self.resize.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        entry = {"image": pixels, "height": height, "width": width, "original": image}
        return self.model([entry])[0]


def load_detector(cfg: CfgNode, model: nn.Module) -> None:
    """Loads ``MODEL.WEIGHTS`` into every parameter and statistic of a detector.

    Raises:
        UsageError, WeightsError: as :class:`Predictor`. The detector is unchanged then.
    """
    require_weights(cfg)
    Trainer.build_checkpointer(cfg, model).load(cfg.MODEL.WEIGHTS, needs_detector=True)


def read_bgr(path: Path) -> np.ndarray:
    """An image as BGR uint8 (H, W, 3), upright as its EXIF data says.

    Raises:
        UnreadableError: broken, or not an image.
    """
    try:
        return np.ascontiguousarray(read_image(str(path), format="BGR"))
    except UnidentifiedImageError as error:  # its message names Pillow's own file object
        raise UnreadableError(f"{path}: cannot be read (no image that Pillow knows)") from error
    except Exception as error:  # Pillow's decoders raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadableError(f"{path}: cannot be read ({reason})") from error


def read_video(path: Path) -> tuple[float, int, Iterator[np.ndarray]]:
    """Frames per second, the number of frames that the file states, and the BGR uint8 frames.

    Raises:
        UnreadableError: OpenCV finds no frame in it.
    """
    capture = cv2.VideoCapture(str(path))
    is_frame, first = capture.read()
    if not is_frame:
        raise UnreadableError(f"{path}: cannot be read as a video (OpenCV finds no frame)")

    def frames() -> Iterator[np.ndarray]:
        going, frame = is_frame, first
        while going:
            yield frame
            going, frame = capture.read()
        capture.release()

    rate, count = (capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
    return rate if rate > 0 else 25.0, max(1, int(count)), frames()

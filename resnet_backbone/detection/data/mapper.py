"""Images as models get them: read, augmented, and replaced if they cannot be read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from torch.utils.data import Dataset

from resnet_backbone.detection.data.arguments import detects_objects
from resnet_backbone.detection.data.problems import read_image
from resnet_backbone.runtime.processes import AUGMENTATION, REPLACEMENT, make_rng, seed_everything

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 20  # maximum number of consecutive unreadable images that are replaced
Sample = tuple[int, int]  # position in the stream, index of the image


class TolerantMapper(DatasetMapper):
    """:class:`DatasetMapper` with our decoder that returns None for an unusable image.

    The training loader then replaces the image. In evaluation an OSError names the file.
    """

    def __call__(self, dataset_dict: dict) -> dict | None:
        try:
            return self._map(copy.deepcopy(dataset_dict))
        except Exception as error:
            where, reason = dataset_dict["file_name"], f"cannot be read ({error})"
            if not isinstance(error, OSError):  # it may be a setting, the same for all images
                reason = f"cannot be augmented or annotated ({type(error).__name__}: {error})"
            if not self.is_train:
                raise OSError(f"{where}: {reason}") from error
            logger.warning("%s: left out of training, %s", where, reason)
            return None

    def _map(self, record: dict) -> dict:
        """Maps like :class:`DatasetMapper`, except for the decoder; modifies ``record``."""
        image, labels = read_image(record["file_name"], self.image_format), None
        utils.check_image_size(record, image)
        if "sem_seg_file_name" in record:
            labels = utils.read_image(record.pop("sem_seg_file_name"), "L").squeeze(2)
        given = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(given)
        shape = given.image.shape[:2]
        pixels = np.ascontiguousarray(given.image.transpose(2, 0, 1))
        record["image"] = torch.as_tensor(pixels)
        if labels is not None:
            record["sem_seg"] = torch.as_tensor(given.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            options = dict(proposal_topk=self.proposal_topk)
            utils.transform_proposals(record, shape, transforms, **options)
        if not self.is_train:
            objects = record.pop("annotations", ())
            record["image_classes"] = sorted({one["category_id"] for one in objects})
        elif "annotations" in record:
            self._transform_annotations(record, transforms, shape)
        return record


def mapper_options(cfg: CfgNode) -> dict:
    """Returns arguments of the training ``DatasetMapper`` that differ from Detectron2's default.

    With ``INPUT.CROP.ENABLED``, localization crops after resizing, as in training a classifier.
    Purely semantic models do too, like Detectron2's DeepLab. They also pad smaller images to the
    crop size, which their pooling requires.
    """
    crop, ignore = cfg.INPUT.CROP, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if crop.ENABLED and cfg.MODEL.META_ARCHITECTURE == "ClassProposalNetwork":
        cropping = T.RandomCrop(crop.TYPE, crop.SIZE)
        return {"augmentations": [*utils.build_augmentation(cfg, is_train=True), cropping]}
    if detects_objects(cfg) or not crop.ENABLED:
        return {}
    largest_share = crop.get("SINGLE_CATEGORY_MAX_AREA", 1.0)
    cropping = T.RandomCrop_CategoryAreaConstraint(crop.TYPE, crop.SIZE, largest_share, ignore)
    resizing, *flipping = utils.build_augmentation(cfg, is_train=True)
    augmentations = [resizing, cropping, *flipping]
    if crop.TYPE == "absolute":
        augmentations.append(T.FixedSizeCrop(tuple(crop.SIZE), pad=True, seg_pad_value=ignore))
    return {"augmentations": augmentations}


class AugmentedImages(Dataset):
    """Mapped images by :data:`Sample`, with random numbers that depend only on its position.

    If the mapper returns None, the image is replaced by another one, always the same for a
    position. OSError: too many images in a row cannot be used.
    """

    def __init__(self, images: Sequence[dict], mapper: Callable[[dict], Any], seed: int):
        self.images, self.mapper, self.seed = images, mapper, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: Sample) -> Any:
        place, index = sample
        others = make_rng(REPLACEMENT, self.seed, place)
        for _ in range(MAX_REPLACEMENTS):
            seed_everything(AUGMENTATION, self.seed, place)
            mapped = self.mapper(self.images[index])
            if mapped is not None:
                return mapped
            index = int(others.integers(len(self.images)))
        raise OSError(f"{MAX_REPLACEMENTS} training images in a row cannot be used; see the log")

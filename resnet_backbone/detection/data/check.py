"""Check a detection data set before training on it.

report = check_voc(root, "trainval", find_voc_classes(root, ["trainval", "test"]))
print(report.summary())
apply_policy(report, "refuse")
"""

from __future__ import annotations

from collections.abc import Sequence

from resnet_backbone.detection.data.coco import scan_coco
from resnet_backbone.detection.data.problems import DataError, DataProblem, DataReport, apply_policy
from resnet_backbone.detection.data.voc import scan_voc

__all__ = ["DataError", "DataProblem", "DataReport", "apply_policy", "check_coco", "check_voc"]


def check_voc(
    root: str,
    split: str,
    class_names: Sequence[str],
    decode: bool = False,
    progress: bool = True,
) -> DataReport:
    """Find what is wrong with a split in VOC layout; the loader leaves out exactly this.

    Reported: XML that is missing or broken; images that are missing, no images, or of another
    size than their XML says; boxes of zero or negative size, not finite, or outside the image by
    more than a pixel; classes that are not in `class_names`; ids listed twice; an empty split.

    Args:
        root: the folder that holds `Annotations/`, or a VOCdevkit folder with one such inside.
        split: name of a file in `ImageSets/Main`, without `.txt`.
        class_names: the classes to train on.
        decode: decode every image, which finds truncated ones (minutes for VOC's 16,551).
        progress: show a progress bar on a terminal.

    Raises:
        DataError: no such folder or split.
    """
    return scan_voc(root, split, class_names, decode, progress)[1]


def check_coco(
    json_file: str, image_root: str, decode: bool = False, progress: bool = True
) -> DataReport:
    """Find what is wrong with a COCO JSON; the loader leaves out exactly this.

    Reported: images and boxes as in :func:`check_voc`; and as "broken-json", which nothing can be
    left out of: missing keys, ids used twice, categories that are not there.

    Args:
        json_file: instances in COCO's format.
        image_root: folder that its file_names are relative to.
        decode, progress: as in :func:`check_voc`.

    Raises:
        DataError: no such file, or it is not JSON.
    """
    return scan_coco(json_file, image_root, decode, progress)[1]

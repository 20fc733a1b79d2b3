"""Check whole folders of VOC and COCO, the official ones or a user's own in the same layout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.coco import inspect_json, scan_coco
from resnet_backbone.detection.data.preparation.official import (
    COUNTS,
    archive_of,
    coco_image_folder,
)
from resnet_backbone.detection.data.preparation.tree_report import SplitCheck, TreeCheck
from resnet_backbone.detection.data.problems import read_image_size
from resnet_backbone.detection.data.voc import (
    IMAGE_SUFFIXES,
    VOC_CLASSES,
    find_voc_classes,
    read_split,
    scan_voc,
)
from resnet_backbone.runtime.errors import DataError

CHUNK = 64  # images handed to a process at a time
SAMPLES = 20  # images of a split that are kept for a picture
OFFICIAL_VOC = ("VOC2007", "VOC2012")


def find_voc_folders(root: str | os.PathLike) -> list[Path]:
    """`root` if it is in VOC layout, else the folders in VOC layout in it and in its VOCdevkit.

    Raises:
        DataError: none.
    """
    root = Path(root)
    places = [root, *_folders(root), *_folders(root / "VOCdevkit")]
    found = [place for place in places if (place / "Annotations").is_dir()]
    if not found:
        raise DataError(
            f"{root} has no folder in VOC layout (Annotations/, JPEGImages/, ImageSets/Main/): "
            "give it, or --archives to unpack"
        )
    return found[:1] if found[0] == root else found


def find_coco_folder(root: str | os.PathLike) -> Path:
    """`root` or its folder coco: the one that holds annotations/.

    Raises:
        DataError: neither does, or there is no such folder.
    """
    if not Path(root).is_dir():
        raise DataError(f"there is no folder {root}: name that of COCO, or --archives to unpack")
    for place in (Path(root), Path(root) / "coco"):
        if (place / "annotations").is_dir():
            return place
    raise DataError(
        f"neither {root} nor {Path(root) / 'coco'} has annotations/: give the folder that holds "
        "it, --archives to unpack, or --coco-json and --image-root"
    )


def check_voc_tree(
    folder: str | os.PathLike,
    own: bool = False,
    splits: Sequence[str] = (),
    workers: int = 0,
    progress: bool = True,
) -> TreeCheck:
    """Checks a folder in VOC layout.

    Args:
        folder: holds Annotations/, JPEGImages/ and ImageSets/Main/.
        own: a user's own data, also if the folder is called VOC2007 or VOC2012.
        splits: names in ImageSets/Main; () takes all but VOC's lists per class.
        workers: processes that decode every image; 0 reads headers only.
        progress: show progress bars on a terminal.

    Raises:
        DataError: a split that does not exist, or no class in any.
    """
    folder = Path(folder)
    name = folder.resolve().name
    tree = TreeCheck(str(folder), "voc", "" if own or name not in OFFICIAL_VOC else name)
    for part in ("JPEGImages", "ImageSets/Main"):
        if not (folder / part).is_dir():
            tree.absent.append(f"{folder / part} does not exist")
    splits = list(splits) or _voc_splits(folder / "ImageSets" / "Main")
    if not splits:
        tree.absent.append(f"{folder / 'ImageSets' / 'Main'} lists no split, NAME.txt with ids")
        return tree
    classes = list(VOC_CLASSES) if tree.official else find_voc_classes(str(folder), splits)
    for split in splits:
        records, report = scan_voc(str(folder), split, classes, progress=progress)
        tree.splits.append(_split_check(tree.official, split, records, report, classes))
    listed = {image_id for split in splits for image_id in read_split(str(folder), split)}
    images = _images(folder / "JPEGImages")
    tree.unlisted = sorted(image for image in images if Path(image).stem not in listed)
    _decode(tree, workers, progress)
    return tree


def check_coco_tree(
    folder: str | os.PathLike,
    own: bool = False,
    splits: Sequence[str] = (),
    workers: int = 0,
    progress: bool = True,
) -> TreeCheck:
    """Checks a folder in COCO's layout: annotations/instances_NAME.json with the images in NAME/.

    Args:
        folder: holds annotations/ and the folders of images.
        own: a user's own data, also with COCO's names.
        splits: "instances_val2017", ...; () takes all instances_* and image_info_*.
        workers, progress: as in :func:`check_voc_tree`.

    Raises:
        DataError: a file of annotations that does not exist or is not JSON.
    """
    folder = Path(folder)
    tree = TreeCheck(str(folder), "coco", "" if own else "coco")
    files = sorted((folder / "annotations").glob("*.json"))
    names = list(splits) or [
        file.stem for file in files if file.stem.startswith(("instances_", "image_info_"))
    ]
    if not names:
        tree.absent.append(f"{folder / 'annotations'} has no instances_*.json or image_info_*.json")
    pairs = []
    for name in names:
        images = folder / coco_image_folder(name)
        if images.is_dir():
            pairs.append((folder / "annotations" / f"{name}.json", images))
        else:
            archive = archive_of(tree.official, name, images=True)
            tree.absent.append(
                f"{images}, the images of {name}, does not exist: "
                f"{f'unpack {archive}' if archive else 'bring it'}, or name what you need with "
                "--splits"
            )
    return _check_pairs(tree, pairs, workers, progress)


def check_coco_files(
    pairs: Iterable[tuple[str | os.PathLike, str | os.PathLike]],
    workers: int = 0,
    progress: bool = True,
) -> TreeCheck:
    """Checks a user's own files in COCO's format, wherever they are.

    Args:
        pairs: (JSON file, folder of its images) each.
        workers, progress: as in :func:`check_voc_tree`.

    Raises:
        DataError: no such file, or it is not JSON.
    """
    pairs = [(Path(file), Path(images)) for file, images in pairs]
    tree = TreeCheck(", ".join(str(file) for file, _ in pairs), "coco")
    return _check_pairs(tree, pairs, workers, progress)


def _check_pairs(tree: TreeCheck, pairs, workers: int, progress: bool) -> TreeCheck:
    unique = len({file.stem for file, _ in pairs}) == len(pairs)
    for file, images in pairs:
        name = file.stem if unique else f"{file.parent.name}_{file.stem}"
        records, report = scan_coco(str(file), str(images), progress=progress)
        classes = list(inspect_json(str(file))[0].values())
        tree.splits.append(_split_check(tree.official, name, records, report, classes))
    images = set().union(*(_images(place) for place in {place for _, place in pairs}))
    listed = {file for split in tree.splits for file in split.files}
    listed |= {problem.file for split in tree.splits for problem in split.report.problems}
    tree.unlisted = sorted(images - listed)
    _decode(tree, workers, progress)
    return tree


def _split_check(official, name, records, report, classes) -> SplitCheck:
    drawn = [record for record in records if record["annotations"]] or records
    step = max(1, len(drawn) // SAMPLES)
    samples = []
    for record in drawn[::step][:SAMPLES]:
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in record["annotations"]
        ]
        samples.append(
            (record["file_name"], boxes, [a["category_id"] for a in record["annotations"]])
        )
    files = [record["file_name"] for record in records]
    return SplitCheck(name, report, classes, files, samples, COUNTS.get((official, name)))


def _decode(tree: TreeCheck, workers: int, progress: bool) -> None:
    """Decodes every image that could be opened, in several processes; adds what fails."""
    files = list(dict.fromkeys(file for split in tree.splits for file in split.files))
    if not workers or not files:
        return
    bar = tqdm(desc="decoding", total=len(files), unit="img", disable=None if progress else True)
    with bar, ProcessPoolExecutor(workers) as pool:
        broken = {}
        for file, problem in zip(
            files, pool.map(_decode_problem, files, chunksize=CHUNK), strict=True
        ):
            bar.update()
            if problem:
                broken[file] = problem
    tree.decoded = len(files)
    for split in tree.splits:
        for file in filter(broken.__contains__, split.files):
            split.report.add("unreadable-image", file, broken[file])
        split.samples = [sample for sample in split.samples if sample[0] not in broken]


def _decode_problem(path: str) -> str:
    try:
        read_image_size(path, decode=True)
    except OSError as error:
        return str(error)
    return ""


def _voc_splits(folder: Path) -> list[str]:
    """The splits in ImageSets/Main; a class's list has a second column and is none."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    return [file.stem for file in files if not _is_class_list(file)]


def _is_class_list(file: Path) -> bool:
    with open(file, encoding="utf-8-sig") as lines:
        return re.fullmatch(r".*\S\s+[+-]?[01]\s*", next(lines, "")) is not None


def _folders(place: Path) -> list[Path]:
    return sorted(entry for entry in place.iterdir() if entry.is_dir()) if place.is_dir() else []


def _images(place: Path) -> set[str]:
    if not place.is_dir():
        return set()
    return {str(place / name) for name in os.listdir(place) if name.endswith(IMAGE_SUFFIXES)}

"""A user's own boxes in the formats that people have, all of the same four images."""

import json
from pathlib import Path

from drawn_images import coco_json, voc_xml
from PIL import Image

WIDTH, HEIGHT = 80, 40
BOXES = {  # image -> (class, box as x0 y0 x1 y1 from 0)
    "a": [("cat", (0, 0, 20, 30)), ("dog", (8, 4, 80, 40))],
    "b": [("dog", (10, 20, 30, 40))],
    "c.d": [("cat", (4, 4, 12, 36))],
    "e": [("cat", (16, 8, 40, 24))],
}
NAMES = ["cat", "dog"]


def images(folder: Path, names=BOXES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{name}.jpg")
    return folder


def write_voc(folder: Path, names=BOXES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        boxes = [(c, (x0 + 1, y0 + 1, x1, y1)) for c, (x0, y0, x1, y1) in BOXES[name]]
        (folder / f"{name}.xml").write_text(voc_xml(f"{name}.jpg", None, boxes))


def write_yolo(folder: Path, names=BOXES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        lines = [
            f"{NAMES.index(c)} {(x0 + x1) / 2 / WIDTH} {(y0 + y1) / 2 / HEIGHT} "
            f"{(x1 - x0) / WIDTH} {(y1 - y0) / HEIGHT}\n"
            for c, (x0, y0, x1, y1) in BOXES[name]
        ]
        (folder / f"{name}.txt").write_text("".join(lines))


def write_coco(file: Path, names=BOXES, prefix="") -> None:
    ids, boxes = {"dog": 7, "cat": 9}, []
    for name in names:
        for kind, (x0, y0, x1, y1) in BOXES[name]:
            boxes.append((name, ids[kind], (x0, y0, x1 - x0, y1 - y0)))
    sizes = {name: (f"{prefix}{name}.jpg", WIDTH, HEIGHT) for name in names}
    content = coco_json({7: "dog", 9: "cat"}, sizes, boxes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def voc_beside(root):
    write_voc(images(root / "data"))
    return root / "data", root / "data"


def voc_apart(root):
    write_voc(root / "xml" / "deep")
    return images(root / "data"), root / "xml"


def coco_file(root, prefix="sub/"):
    write_coco(root / "all.json", prefix=prefix)
    images(root / "data" / "sub")
    return root / "data", root / "all.json"


def coco_of_a_folder_inside(root):
    return coco_file(root, prefix="")


def yolo_folders(root):
    write_yolo(root / "data" / "labels")
    images(root / "data" / "images")
    (root / "data" / "data.yaml").write_text("names: {0: cat, 1: dog}\nnc: 2\n")
    return root / "data", root / "data"


def yolo_of_one_split(root):
    write_yolo(root / "data" / "labels" / "train")
    (root / "data" / "data.yaml").write_text("names: [cat, dog]\n")
    return images(root / "data" / "images" / "train"), root / "data" / "labels" / "train"


def yolo_beside(root):
    write_yolo(images(root / "data"))
    (root / "data" / "classes.txt").write_text("cat\ndog\n")
    return root / "data", root / "data"


def roboflow(write):
    def make(root):
        for folder, names in (("train", ["a", "b"]), ("valid", ["c.d"]), ("test", ["e"])):
            write(images(root / "data" / folder, names), names)
        (root / "data" / "data.yaml").write_text("names: [cat, dog]\n")
        (root / "data" / "README.roboflow.txt").write_text("0 0 0 0 0\n")
        return root / "data", root / "data"

    return make


def found(splits, names):
    """Image -> its boxes, as in ``BOXES``."""
    return {
        Path(record["file_name"]).stem: [
            (names[one["category_id"]], tuple(round(side, 3) for side in one["bbox"]))
            for one in record["annotations"]
        ]
        for records in splits.values()
        for record in records
    }

"""VOC 2007's images that show one class, laid out as ILSVRC's localization set.

python make_data.py VOCdevkit/VOC2007 ILSVRC
"""

import random
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

voc, out = map(Path, sys.argv[1:])
for split, source, limit in (("train", "trainval", None), ("val", "test", 500)):
    found = []
    for name in (voc / f"ImageSets/Main/{source}.txt").read_text().split():
        objects = list(ET.parse(voc / f"Annotations/{name}.xml").iter("object"))
        classes = {one.findtext("name") for one in objects}
        if len(classes) == 1:
            found.append((name, classes.pop()))
    if limit:
        found = sorted(random.Random(0).sample(found, limit))
    covered = 0
    for name, label in found:
        for kind, folder, suffix in (
            ("Data", "JPEGImages", ".jpg"),
            ("Annotations", "Annotations", ".xml"),
        ):
            target = out / kind / "CLS-LOC" / split / label
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(voc / folder / f"{name}{suffix}", target)
        tree = ET.parse(voc / f"Annotations/{name}.xml")
        width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        corners = (
            [float(box.findtext(corner)) for corner in ("xmin", "ymin", "xmax", "ymax")]
            for box in tree.iter("bndbox")
        )
        areas = [(x1 - x0 + 1) * (y1 - y0 + 1) for x0, y0, x1, y1 in corners]
        covered += max(areas) / (width * height) >= 0.5
    wrong = 100 - 100 * covered / len(found)
    print(f"{split}: {len(found)} images; the whole image as the box: {wrong:.1f} % wrong")

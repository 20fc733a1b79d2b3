"""VOC 2007 laid out as ILSVRC's detection set: trainval as train, test as val.

python make_data.py VOCdevkit/VOC2007 ILSVRC
"""

import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

voc, out = map(Path, sys.argv[1:])
classes = set()
for split, source in (("train", "trainval"), ("val", "test")):
    names = (voc / f"ImageSets/Main/{source}.txt").read_text().split()
    for kind, folder, old, new in (
        ("Data", "JPEGImages", ".jpg", ".JPEG"),
        ("Annotations", "Annotations", ".xml", ".xml"),
    ):
        (out / kind / "DET" / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(voc / folder / f"{name}{old}", out / kind / "DET" / split / f"{name}{new}")
    listed = out / "ImageSets/DET" / f"{split}.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("".join(f"{name} {number}\n" for number, name in enumerate(names, 1)))
    for name in names:
        objects = ET.parse(voc / f"Annotations/{name}.xml").iter("object")
        classes |= {one.findtext("name") for one in objects}
    print(f"{split}: {len(names)} images")
named = out / "devkit/data/map_det.txt"  # the development kit's list of classes
named.parent.mkdir(parents=True, exist_ok=True)
numbered = enumerate(sorted(classes), 1)
named.write_text("".join(f"{name} {number} {name}\n" for number, name in numbered))

"""Smooth random images, which a JPEG keeps, as arrays and as files; annotations of VOC and COCO."""

import io

import numpy as np
from PIL import Image


def picture(height=48, width=64, mode="RGB", seed=0, coarse=12) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind="JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def fill(folder, classes=("n01", "n02"), count=7, size=(52, 44), suffix=".JPEG"):
    """Writes ``folder/<class>/<number>.JPEG``, each another picture; returns the folder."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(*size[::-1], seed=100 * number + i).save(folder / name / f"{i}{suffix}")
    return folder


def voc_xml(image_name, size, objects) -> str:
    """VOC annotation text.

    Args:
        image_name: text of <filename>.
        size: (width, height), or None to leave <size> out.
        objects: (class, (xmin, ymin, xmax, ymax)) or (class, box, difficult) each.
    """
    parts = [f"<annotation><filename>{image_name}</filename>"]
    if size is not None:
        parts.append("<size><width>{}</width><height>{}</height></size>".format(*size))
    for name, box, *difficult in objects:
        corners = "".join(
            f"<{key}>{value}</{key}>"
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        extra = "".join(f"<difficult>{d}</difficult>" for d in difficult)
        extra += "<pose>Left</pose><truncated>0</truncated>" if difficult else ""
        parts.append(f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>")
    return "".join([*parts, "</annotation>"])


def coco_json(categories, images, boxes) -> dict:
    """COCO's annotations, as its JSON files have them.

    Args:
        categories: name by id.
        images: (file name, width, height) by id.
        boxes: (image id, category id, (x, y, width, height)) or (..., further keys) each.
    """
    keys = "file_name", "width", "height"
    return {
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
        "images": [{"id": n, **dict(zip(keys, image, strict=True))} for n, image in images.items()],
        "annotations": [
            {"id": number, "image_id": image, "category_id": kind, "bbox": [*box], **dict(*more)}
            for number, (image, kind, box, *more) in enumerate(boxes, 1)
        ],
    }

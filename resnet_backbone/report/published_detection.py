"""Published detection results, as they are printed, each with its data and its source.

"paper" is arXiv 1512.03385. Reimplementations are the best ones of the sources named here.
"""

from __future__ import annotations

from typing import NamedTuple

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike"
    " person pottedplant sheep sofa train tvmonitor"
).split()
COCO_CLASS_COUNT = 80

TF = "tf-faster-rcnn"
ZOO = "Detectron2's model zoo"
VOC_DATA = "VOC 07+12 trainval → 07 test"
COCO_DATA = "COCO 2014 train → val"
COCO_35K = "COCO 2014 trainval35k → minival"
COCO_2017 = "COCO train2017 → val2017"


class Number(NamedTuple):
    """One published number in percent, what it was trained on → measured on, who printed it."""

    value: float
    data: str
    source: str


class Published(NamedTuple):
    """A row: task, network, the paper's number and the best public reimplementation's."""

    task: str  # "voc": AP50; "coco": AP over IoU .5:.95
    family: str
    depth: int
    paper: Number | None
    public: Number | None


METRIC = {"voc": "AP50", "coco": "AP"}
NAMES = {"voc": "PASCAL VOC, AP50", "coco": "COCO, AP"}

PUBLISHED = (
    Published(
        "voc", "VGG", 16, Number(73.2, VOC_DATA, "Table 7"), Number(75.7, VOC_DATA, f"{TF}, conv5")
    ),
    Published(
        "voc",
        "ResNet",
        50,
        None,
        Number(81.3, VOC_DATA, "MoCo's Detectron2 config, C4, mean of 5"),
    ),
    Published(
        "voc", "ResNet", 101, Number(76.4, VOC_DATA, "Table 7"), Number(79.8, VOC_DATA, f"{TF}, C4")
    ),
    Published(
        "coco",
        "VGG",
        16,
        Number(21.2, COCO_DATA, "Table 8"),
        Number(30.2, COCO_35K, f"{TF}, conv5"),
    ),
    Published("coco", "ResNet", 50, None, Number(40.2, COCO_2017, f"{ZOO}, FPN, 3x")),
    Published(
        "coco",
        "ResNet",
        101,
        Number(27.2, COCO_DATA, "Table 8"),
        Number(42.0, COCO_2017, f"{ZOO}, FPN, 3x"),
    ),
    Published("coco", "ResNet", 152, None, Number(36.1, COCO_35K, f"{TF}, C4")),
)

# Gains of ResNet-101 over VGG-16 in one source: the two numbers, data, source.
GAINS = {
    "voc": ((76.4, 73.2, VOC_DATA, "Table 7"), (79.8, 75.7, VOC_DATA, TF)),
    "coco": ((27.2, 21.2, COCO_DATA, "Table 8"), (35.4, 30.2, COCO_35K, TF)),
}


def published_gain(task: str) -> tuple[Number, Number]:
    """ResNet-101 minus VGG-16: the paper's, and one reimplementation's."""
    paper, public = (
        Number(round(high - low, 1), data, f"{source}: {high:.1f} − {low:.1f}")
        for high, low, data, source in GAINS[task]
    )
    return paper, public


class Improvement(NamedTuple):
    """A row of Table 9: ResNet-101, COCO; AP50 and AP in percent, None where not printed."""

    name: str
    keys: tuple[str, ...]  # words in the names of our rows
    val: tuple[float, float] | None  # trained on train, measured on val
    test_dev: tuple[float, float] | None  # trained on trainval


# Each row adds to the one above.
IMPROVEMENTS = (
    Improvement("baseline", ("baseline",), (48.4, 27.2), None),
    Improvement("+ box refinement", ("refinement",), (49.9, 29.9), None),
    Improvement("+ global context", ("context",), (51.1, 30.0), (53.3, 32.2)),
    Improvement("+ multi-scale testing", ("multi",), (53.8, 32.5), (55.7, 34.9)),
    Improvement("ensemble of 3", ("ensemble",), None, (59.0, 37.4)),
)


class Protocol(NamedTuple):
    """What the published numbers were trained and measured on.

    Attributes:
        iterations, images_per_batch: of the training.
        train_images, test_images: the smallest sets that the paper uses.
        short_side: of an image in the test, in pixels.
    """

    iterations: int
    images_per_batch: int
    train_images: int
    test_images: int
    short_side: int


# Faster R-CNN, arXiv 1506.01497, section 3.3, for VOC 07; the paper's appendix A for COCO.
PROTOCOLS = {
    "voc": Protocol(80_000, 2, 5_011, 4_952, 600),
    "coco": Protocol(320_000, 16, 80_000, 40_000, 600),
}


def task_of(classes: list[str], metric: str) -> str:
    """ "voc" or "coco" by the classes of a result and the metric they have; "" for other data."""
    if set(classes) == set(VOC_CLASSES):
        return "voc"
    return "coco" if len(classes) == COCO_CLASS_COUNT and metric == "AP" else ""

"""What is published about the official archives and splits of PASCAL VOC and COCO.

Sizes and SHA-256 sums of the archives: TensorFlow Datasets (tensorflow/datasets on GitHub,
tensorflow_datasets/url_checksums/voc.txt and coco.txt). MD5 sums: torchvision
(torchvision/datasets/voc.py), PaddleDetection (ppdet/utils/download.py, COCO 2017) and LAVIS
(lavis/datasets/download_scripts/download_coco.py, COCO 2014); "" where none of them has one.

Images and boxes of the splits: Liu et al., Deep Learning for Generic Object Detection: A Survey
(IJCV 2020, arXiv 1809.02165), Table 3; the test sets: TensorFlow Datasets' catalog, and for
COCO's test-dev Ultralytics' coco.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """One official archive.

    Attributes:
        size: in bytes.
        sha256, md5: hexadecimal; md5 is "" where none is published.
    """

    size: int
    sha256: str
    md5: str


# name, size, MD5 or -, SHA-256
_TABLE = """
VOCtrainval_06-Nov-2007.tar 460032000 c52e279531787c972589f7e41ab4ae64
    7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508
VOCtest_06-Nov-2007.tar 451020800 b6e924de25625d8de591ea690078ad9f
    6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892
VOCtrainval_11-May-2012.tar 1999639040 6cd6e144f989b92b3379bac3b3de84fd
    e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb
VOC2012test.tar 1850626560 -
    f08582b1935816c5eab3bbb1eb6d06201a789eaa173cdf1cf400c26f0cac2fb3
train2014.zip 13510573713 0da8c0bd3d6becc4dcb32757491aca88
    ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775
val2014.zip 6645013297 a3d79f5ed8d289b7a7554ce06a5782b3
    fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0
test2014.zip 6660437059 04127eef689ceac55e3a572c2c92f264
    ead40c62230cb2cf70ff4c8b4c70abdc260a7556e77b3282621d06d8e2e35bdf
test2015.zip 13270587935 -
    1a2aa896b81140a850a78fa8bff07d455698d2abf364ff05721763458a8101ca
train2017.zip 19336861798 cced6f7f71b7629ddf16f17bbcfab6b2
    69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929
val2017.zip 815585330 442b8da7639aecaf257c1dceb8ba8c80
    4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05
test2017.zip 6646970404 -
    c7908c3c9f94ba2f3340ebbeec58c25db6be8774f18d68c2f15d0e369d95baba
annotations_trainval2014.zip 252872794 -
    031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009
annotations_trainval2017.zip 252907541 f4bbac642086de4f52a3fdda2de5fa2c
    113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268
image_info_test2014.zip 763464 -
    7cecc66f6b09c1671c1896a1bcc1f35eb09b7fcf00a5c18420a5f0f5983dc8c9
image_info_test2015.zip 1887164 -
    cf400242f8497257fb8a3e369bc766491f4a7e42625fb3d72555504e9a8c3b18
image_info_test2017.zip 1144034 -
    e52f412dd7195ac8f98d782b44c6dd30ea10241e9f42521f67610fbe055a74f8
"""
_WORDS = iter(_TABLE.split())
ARCHIVES = {
    name: Archive(int(size), sha256, md5.strip("-"))
    for name, size, md5, sha256 in zip(_WORDS, _WORDS, _WORDS, _WORDS, strict=True)
}
"""Name -> what is published about it."""


@dataclass(frozen=True)
class Counts:
    """What a split holds.

    Attributes:
        images: listed in the split.
        boxes: annotated boxes; of VOC those that are not difficult, of COCO crowds too. None for
            test sets whose annotations are not public.
        difficult: of VOC; None where no count is published.
    """

    images: int
    boxes: int | None = None
    difficult: int | None = None


COUNTS = {
    ("VOC2007", "train"): Counts(2501, 6301, 7844 - 6301),
    ("VOC2007", "val"): Counts(2510, 6307, 7818 - 6307),
    ("VOC2007", "trainval"): Counts(5011, 12608, 7844 + 7818 - 12608),
    ("VOC2007", "test"): Counts(4952, 24640 - 12608),  # TensorFlow Datasets: 24,640 in the year
    ("VOC2012", "train"): Counts(5717, 13609, 15774 - 13609),
    ("VOC2012", "val"): Counts(5823, 13841, 15787 - 13841),
    ("VOC2012", "trainval"): Counts(11540, 27450, 15774 + 15787 - 27450),
    ("VOC2012", "test"): Counts(10991),
    ("coco", "instances_train2014"): Counts(82783, 604907),
    ("coco", "instances_val2014"): Counts(40504, 291875),
    ("coco", "instances_train2017"): Counts(118287, 860001),
    ("coco", "instances_val2017"): Counts(5000, 36781),
    ("coco", "image_info_test2014"): Counts(40775),
    ("coco", "image_info_test2015"): Counts(81434),
    ("coco", "image_info_test2017"): Counts(40670),
    ("coco", "image_info_test-dev2017"): Counts(20288),
}
"""(folder, split) -> counts; VOC's splits are files in ImageSets/Main, COCO's in annotations."""


def archive_of(folder: str, split: str, images: bool = False) -> str:
    """The official archive that a split comes in; "" for a split that is in none.

    Args:
        folder, split: as in :data:`COUNTS`; of COCO any instances_* and image_info_*.
        images: COCO keeps images apart from annotations: the archive of the images.
    """
    if folder == "VOC2007":
        name = "VOCtest_06-Nov-2007.tar" if split == "test" else "VOCtrainval_06-Nov-2007.tar"
    elif folder == "VOC2012":
        name = "VOC2012test.tar" if split == "test" else "VOCtrainval_11-May-2012.tar"
    elif images:
        name = f"{coco_image_folder(split)}.zip"
    elif split.startswith("image_info_"):
        name = f"image_info_{coco_image_folder(split)}.zip"
    else:
        name = f"annotations_trainval{split[-4:]}.zip"
    return name if (folder, split) in COUNTS and name in ARCHIVES else ""


def coco_image_folder(split: str) -> str:
    """The folder of images that belongs to an annotation file, as COCO and Detectron2 name them.

    "instances_train2017" -> "train2017", "image_info_test-dev2017" -> "test2017",
    "instances_valminusminival2014" -> "val2014", "instances_val2017_100" -> "val2017".
    """
    name = split.removeprefix("instances_").removeprefix("image_info_").removesuffix("_100")
    for variant, plain in (("test-dev", "test"), ("valminusminival", "val"), ("minival", "val")):
        name = name.replace(variant, plain)
    return name

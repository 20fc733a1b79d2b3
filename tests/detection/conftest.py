"""What the Detectron2 tests share: configs, random weights, a tiny data set."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import coco_json, voc_xml
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from resnet_backbone.weights import Preprocessing

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = PROJECT / "configs" / "detection"
COLORS = {"bar": (220, 40, 40), "box": (40, 60, 230)}
INPUT = Preprocessing("RGB", 255.0, (130.0, 121.5, 110.0), (60.0, 61.0, 62.5), source="our digits")
SPLITS = {"train": range(6), "test": range(6, 8)}
if find_spec("detectron2") is None:
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def clean_catalogs():
    """Data sets that a test registers are gone afterwards."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    catalogs = DatasetCatalog, MetadataCatalog
    before = [set(catalog) for catalog in catalogs]
    yield
    for catalog, names in zip(catalogs, before, strict=True):
        for name in set(catalog) - names:
            del catalog[name]


@pytest.fixture
def make_cfg():
    """Function (file under configs/detection, or None; KEY=value...) -> config on the CPU.

    Dots in keys are written as two underscores. ``node=False`` leaves our node out.
    """

    def make(file=None, node=True, **keys):
        from detectron2.config import get_cfg

        from resnet_backbone.detection import add_resnet_backbone_config

        cfg = add_resnet_backbone_config(get_cfg()) if node else get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        if file:
            cfg.merge_from_file(str(CONFIGS / file))
        for key, value in keys.items():
            cfg.merge_from_list([key.replace("__", "."), value])
        return cfg

    return make


FAMILIES = {
    "C4": dict(file="voc/faster_rcnn_R_18_C4.yaml"),
    "VGG": dict(file="voc/faster_rcnn_VGG_16.yaml", RESNET_BACKBONE__VGG__DEPTH=11),
    "FPN": dict(file="voc/faster_rcnn_R_18_FPN.yaml", MODEL__FPN__OUT_CHANNELS=16),
}


@pytest.fixture
def make_family(make_cfg):
    """Function (one of FAMILIES, KEY=value...) -> config of such a detector with small heads."""
    cheap = dict(MODEL__ROI_HEADS__NUM_CLASSES=2, MODEL__ROI_BOX_HEAD__FC_DIM=16)
    cheap |= dict(MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION=4)
    cheap |= dict(MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=8, MODEL__RPN__POST_NMS_TOPK_TRAIN=10)
    return lambda family, **keys: make_cfg(**(FAMILIES[family] | cheap | keys))


@pytest.fixture
def small():
    """Config keys of small heads, for tests of the backbone in a whole detector."""
    return dict(MODEL__FPN__OUT_CHANNELS=16, MODEL__ROI_BOX_HEAD__FC_DIM=16)


def write_scene(root: Path, image_id: str, seed: int, is_upright: bool) -> None:
    """A gray 96 x 64 picture, or its transpose, with a red bar and a blue box, and its XML."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(100, 150, (64, 96, 3), dtype=np.uint8))
    boxes = {}
    for name, (width, height), left in (("bar", (16, 40), 4), ("box", (36, 20), 52)):
        x, y = left + int(rng.integers(0, 8)), int(rng.integers(2, 20))
        ImageDraw.Draw(image).rectangle((x, y, x + width - 1, y + height - 1), COLORS[name])
        box = (x + 1, y + 1, x + width, y + height)
        boxes[name] = (box[1], box[0], box[3], box[2]) if is_upright else box
    image = image.transpose(Image.Transpose.TRANSPOSE) if is_upright else image
    image.save(root / "JPEGImages" / f"{image_id}.jpg")
    objects = [(name, box, 0) for name, box in boxes.items()]
    text = voc_xml(f"{image_id}.jpg", image.size, objects)
    (root / "Annotations" / f"{image_id}.xml").write_text(text)


@pytest.fixture(scope="session")
def write_voc():
    """Function (root, numbers of pictures by split) -> root, a VOC folder of classes bar and box.

    With `upright` every so manyth picture is higher than wide.
    """

    def write(root, splits, upright=0) -> Path:
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / name).mkdir(parents=True)
        for split, numbers in splits.items():
            ids = [f"{number:06d}" for number in numbers]
            (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
            for number, image_id in zip(numbers, ids, strict=True):
                write_scene(root, image_id, number, bool(upright) and number % upright == 0)
        return root

    return write


@pytest.fixture(scope="session")
def tiny_voc(tmp_path_factory, write_voc) -> Path:
    """A VOC folder of 8 pictures with splits train (6) and test (2), classes bar and box."""
    return write_voc(tmp_path_factory.mktemp("tiny") / "VOC2007", SPLITS)


CATEGORIES = {90: "bar", 7: "box"}  # not in order, and with gaps


@pytest.fixture(scope="session")
def tiny_coco(tiny_voc):
    """Function (file, numbers of pictures, annotated, only) -> file of these in COCO's format.

    Ids of images are 100 + number. ``only`` is the id of a category whose boxes alone are kept.
    """
    from resnet_backbone.detection.data import scan_voc

    def write(path, numbers, annotated=True, only=None) -> str:
        images, boxes, names = {}, [], [*CATEGORIES.values()]
        records = [one for split in SPLITS for one in scan_voc(tiny_voc, split, names)[0]]
        for record in (one for one in records if int(one["image_id"]) in numbers):
            number = 100 + int(record["image_id"])
            images[number] = f"{record['image_id']}.jpg", 96, 64
            for one in record["annotations"]:
                x, y, right, bottom = one["bbox"]
                key, box = [*CATEGORIES][one["category_id"]], (x, y, right - x, bottom - y)
                more = {"iscrowd": 0, "area": box[2] * box[3]}
                more["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
                if only in (None, key):
                    boxes.append((number, key, box, more))
        content = coco_json(CATEGORIES, images, boxes)
        if not annotated:
            content.pop("annotations")  # as in COCO's image_info files
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def make_images():
    """Function (sizes) -> Detectron2 inputs of these sizes with two instances each."""

    def make(*sizes):
        from detectron2.structures import Boxes, Instances

        generator, inputs = torch.Generator().manual_seed(0), []
        for size in sizes:
            boxes = Boxes(torch.tensor([[4.0, 6.0, 30.0, 50.0], [20.0, 10.0, 70.0, 40.0]]))
            instances = Instances(size, gt_boxes=boxes, gt_classes=torch.tensor([0, 1]))
            image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
            inputs.append(dict(image=image, instances=instances, height=size[0], width=size[1]))
        return inputs

    return make


@pytest.fixture
def images(make_images):
    """Two Detectron2 inputs with instances, 60 x 84 and 64 x 75."""
    return make_images((60, 84), (64, 75))


@pytest.fixture
def write(tmp_path):
    """Function (network, preprocessing, options) -> a file with that metadata and no network."""

    from resnet_backbone.weights.checkpoint import MEAN_IMAGE_KEY, METADATA_KEY, MODEL_KEY

    def write(name="resnet18", expected=INPUT, mean_image=False, **options) -> str:
        notes = {} if expected is None else {METADATA_KEY: expected.to_json()}
        if name:
            spec = {"name": name, "num_classes": 10, "options": options}
            notes[MODEL_KEY] = json.dumps(spec)
        key = MEAN_IMAGE_KEY if mean_image else "x"
        save_file({key: torch.zeros(3, 2, 2)}, tmp_path / "file.safetensors", notes)
        return str(tmp_path / "file.safetensors")

    return write


@pytest.fixture
def tiny_training():
    """Overrides for a quick training of the quickstart's config that leaves weights as they are."""
    return """INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 MODEL.FPN.OUT_CHANNELS 16
    MODEL.ROI_BOX_HEAD.FC_DIM 16 SOLVER.AMP.ENABLED False SOLVER.IMS_PER_BATCH 2
    SOLVER.BASE_LR 0.0 SOLVER.WEIGHT_DECAY 0.0""".split()


@pytest.fixture
def train(train_net, tiny_voc, tiny_training):
    """Function (run folder, weights, argument...) -> lines of stderr, as :func:`train_net`."""

    def run(output, weights, *arguments, code=0):
        where = ["--voc-root", tiny_voc, "--train-set", "train", "--test-set", "test"]
        options = ["--output-dir", output, "--weights", weights, *arguments]
        keys = [*options, *tiny_training]
        return train_net("quickstart/faster_rcnn_R_18_FPN.yaml", *where, *keys, code=code)

    return run


@pytest.fixture
def train_net(run_command):
    """Function (config file or None, argument..., expected exit status) -> lines of stderr."""
    tool = importlib.import_module("resnet_backbone.cli.train_net")

    def run(config, *arguments, code=0):
        file = [] if config is None else ["--config-file", CONFIGS / config]
        status, _, errors = run_command(tool.main, *file, *arguments)
        assert status == code, errors
        return errors.splitlines()

    return run


@pytest.fixture
def prepare_own(run_command):
    """Function (argument...) -> exit status of prepare-data own, what it printed, its errors."""
    from resnet_backbone.cli import prepare_data

    return lambda *arguments: run_command(prepare_data.main, "own", *arguments)

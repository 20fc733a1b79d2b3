"""Training data as a pure function of the iteration, so that training can resume anywhere."""

from __future__ import annotations

import itertools
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.build import load_proposals_into_dataset, print_instances_class_histogram
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import ConcatDataset, DataLoader

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.data.arguments import usable_records
from resnet_backbone.detection.data.mapper import AugmentedImages, Sample
from resnet_backbone.detection.data.records import Records
from resnet_backbone.detection.data.scans import dataset_records
from resnet_backbone.runtime.processes import ORDER, SUBSET, available_cores, make_rng
from resnet_backbone.runtime.signals import ignore_interrupts

logger = logging.getLogger(__name__)

# Detectron2's samplers with repetition
REPEATING = tuple(
    f"{kind}TrainingSampler" for kind in ("RepeatFactor", "Weighted", "WeightedCategory")
)


@dataclass(frozen=True)
class ImageStream:
    """An endless stream of epochs of a training set, each in a new random order."""

    seed: int  # of the run
    indices: np.ndarray  # images to train on
    # Mean number of repetitions per epoch; None: once. Fractions are rounded at random, as in
    # Detectron2's RepeatFactorTrainingSampler (arXiv 1908.03195, appendix B.2).
    factors: np.ndarray | None = None

    def epoch(self, number: int) -> np.ndarray:
        """Returns the image indices of one epoch in order, int64."""
        rng = make_rng(ORDER, self.seed, number)
        indices = self.indices
        if self.factors is not None:
            whole = np.floor(self.factors)
            repeats = whole + (rng.random(len(indices)) < self.factors - whole)
            indices = np.repeat(indices, repeats.astype(np.int64))
        return rng.permutation(indices)

    def __iter__(self) -> Iterator[Sample]:
        epochs = (self.epoch(number).tolist() for number in itertools.count())
        return enumerate(itertools.chain.from_iterable(epochs))


def group(stream: Iterable[Sample], size: int, wide: Sequence[bool] | None) -> Iterator[list]:
    """Groups a stream into lists of `size` samples, by orientation if `wide` is given."""
    buckets: tuple[list, list] = [], []
    for sample in stream:
        bucket = buckets[wide is not None and wide[sample[1]]]
        bucket.append(sample)
        if len(bucket) == size:
            yield bucket[:]
            bucket.clear()


@dataclass(frozen=True)
class BatchPlan:
    """Divides a batch (``SOLVER.IMS_PER_BATCH``) into ``processes * accumulate`` parts.

    Each process runs `accumulate` consecutive parts in turn. Images are grouped by orientation
    within parts, so training depends only on the product of processes and `accumulate`.
    """

    batch: int
    accumulate: int = 1
    processes: int = 1
    rank: int = 0

    def __post_init__(self):
        if self.accumulate < 1:
            raise UsageError(f"RESNET_BACKBONE.ACCUMULATE {self.accumulate}: give at least 1")
        if self.batch < 1 or self.batch % self.num_parts:
            raise UsageError(
                f"SOLVER.IMS_PER_BATCH {self.batch} cannot be divided into {self.processes} "
                f"process{'es' * (self.processes > 1)} x {self.accumulate} parts "
                f"(RESNET_BACKBONE.ACCUMULATE): choose a multiple of {self.num_parts}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> BatchPlan:
        accumulate = cfg.RESNET_BACKBONE.ACCUMULATE
        return cls(cfg.SOLVER.IMS_PER_BATCH, accumulate, comm.get_world_size(), comm.get_rank())

    @property
    def num_parts(self) -> int:
        return self.processes * self.accumulate

    @property
    def part(self) -> int:
        """Number of images per part."""
        return self.batch // self.num_parts

    def number(self, iteration: int, part: int) -> int:
        """Returns the index of this process's part among all parts of a run."""
        return iteration * self.num_parts + self.rank * self.accumulate + part

    def own(self, parts: Iterable[list], iteration: int) -> Iterator[list]:
        """Yields this process's parts from an iteration on."""
        for number, part in enumerate(parts):
            is_own = number // self.accumulate % self.processes == self.rank
            if is_own and number >= iteration * self.num_parts:
                yield part


@dataclass
class TrainingLoader:
    """An endless iterable over this process's parts of batches: lists of mapped images.

    The data of an iteration depend only on the seed, and not on the number of workers or on what
    was read before.
    """

    dataset: AugmentedImages
    stream: ImageStream
    plan: BatchPlan
    wide: Sequence[bool] | None = None  # whether each image is wider than high
    num_workers: int = 0

    @property
    def seed(self) -> int:
        return self.stream.seed

    def samples(self, iteration: int) -> Iterator[list[Sample]]:
        """Yields this process's parts from an iteration on, as positions and indices."""
        return self.plan.own(group(self.stream, self.plan.part, self.wide), iteration)

    def start(self, iteration: int) -> Iterator[list]:
        """Returns an iterator of parts from an iteration on, `accumulate` per iteration."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.samples(iteration),
            num_workers=self.num_workers,
            collate_fn=list,
            worker_init_fn=ignore_interrupts,
        )
        return iter(loader)

    def __iter__(self) -> Iterator[list]:
        return self.start(0)


def build_loader(cfg: CfgNode, mapper: Callable[[dict], Any], seed: int) -> TrainingLoader:
    """Builds the training loader from ``DATALOADER``; UsageError for unusable settings."""
    plan, sampler = BatchPlan.from_config(cfg), cfg.DATALOADER.SAMPLER_TRAIN
    parts = [training_records(cfg, name) for name in cfg.DATASETS.TRAIN]
    images = ConcatDataset(parts)
    indices, factors, wide = np.arange(len(images)), None, None
    if sampler == "RandomSubsetTrainingSampler":
        share = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO", 0)  # a key of some versions of Detectron2
        count = int(len(images) * share)
        if not 0 < count <= len(images):
            raise UsageError(
                f"DATALOADER.RANDOM_SUBSET_RATIO {share} of {len(images)} images is {count}: set a "
                "share above 0 and at most 1"
            )
        indices = make_rng(SUBSET, seed).permutation(len(images))[:count]
    elif sampler != "TrainingSampler":
        factors = repeat_factors(cfg, parts)
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        widths, heights = (
            np.concatenate([part.image_column(side) for part in parts])
            for side in ("width", "height")
        )
        if min(widths.min(), heights.min()) < 0:
            raise UsageError(
                "DATALOADER.ASPECT_RATIO_GROUPING needs the width and height of each image, which "
                "the data set does not give: set it False"
            )
        wide = (widths > heights).tolist()
    logger.info("training on %d images, sampler %s", len(indices), sampler)
    dataset = AugmentedImages(images, mapper, seed)
    stream = ImageStream(seed, indices, factors)
    return TrainingLoader(dataset, stream, plan, wide, cfg.DATALOADER.NUM_WORKERS)


def training_records(cfg: CfgNode, name: str) -> Records:
    """Returns a data set's training records, with precomputed proposals if the model needs them."""
    found = dataset_records(name)
    records = usable_records(cfg, name, found)
    if len(records) < len(found):
        text = "data set %s: %d of %d images have nothing to learn from and are left out; see "
        text += "DATALOADER.FILTER_EMPTY_ANNOTATIONS"
        logger.info(text, name, len(found) - len(records), len(found))
    _log_class_counts(name, records)
    if not cfg.MODEL.LOAD_PROPOSALS:
        return records
    files = dict(zip(cfg.DATASETS.TRAIN, cfg.DATASETS.PROPOSAL_FILES_TRAIN, strict=False))
    if name not in files:
        raise UsageError(
            f"MODEL.LOAD_PROPOSALS: DATASETS.PROPOSAL_FILES_TRAIN has no file for {name}"
        )
    return Records.pack(load_proposals_into_dataset(list(records), files[name]), pickle.loads)


def _log_class_counts(name: str, records: Records) -> None:
    """Logs Detectron2's table of the number of objects per class."""
    classes = MetadataCatalog.get(name).get("thing_classes")
    if classes and records.image_column("has_annotations").all():
        categories = records.box_column("category")[records.box_column("crowd") == 0]
        counts = np.bincount(categories).tolist()
        rows = ({"annotations": [{"category_id": c}] * count} for c, count in enumerate(counts))
        print_instances_class_histogram(rows, classes)


def repeat_factors(cfg: CfgNode, parts: Sequence[Records]) -> np.ndarray:
    """Returns how often each training image occurs per epoch with a :data:`REPEATING` sampler."""
    loader, sampler = cfg.DATALOADER, cfg.DATALOADER.SAMPLER_TRAIN
    if sampler not in REPEATING:
        raise UsageError(
            f"DATALOADER.SAMPLER_TRAIN {sampler!r}: choose TrainingSampler, "
            f"RandomSubsetTrainingSampler, {', '.join(REPEATING)}"
        )

    def by_category(some: Sequence[Records]) -> np.ndarray:
        rule = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        images = [image for part in some for image in _images_with_categories(part)]
        return (
            rule(images, loader.REPEAT_THRESHOLD, sqrt=loader.get("REPEAT_SQRT", True))
            .double()
            .numpy()
        )

    if sampler == "RepeatFactorTrainingSampler":
        return by_category(parts)
    # a key of some versions of Detectron2
    weights, found = dict(cfg.DATASETS.get("TRAIN_REPEAT_FACTOR", ())), []
    unknown = weights.keys() - set(cfg.DATASETS.TRAIN)
    if unknown:
        raise UsageError(
            f"DATASETS.TRAIN_REPEAT_FACTOR names {sorted(unknown)}, not in DATASETS.TRAIN"
        )
    for name, part in zip(cfg.DATASETS.TRAIN, parts, strict=True):
        factors = np.full(len(part), float(weights.get(name, 1)))
        if sampler == "WeightedCategoryTrainingSampler":
            factors *= by_category([part])
        found.append(factors)
    factors = np.concatenate(found)
    if factors.min() <= 0:
        raise UsageError("DATASETS.TRAIN_REPEAT_FACTOR: factors must be above 0")
    return factors / factors.min() if sampler == "WeightedCategoryTrainingSampler" else factors


def _images_with_categories(records: Records) -> list[dict]:
    """Returns the parts of each image that Detectron2's rule reads."""
    images: list[dict] = [{"annotations": []} for _ in range(len(records))]
    columns = (records.box_column(name).tolist() for name in ("image", "category"))
    for image, category in zip(*columns, strict=True):
        images[image]["annotations"].append({"category_id": category})
    return images


def limit_workers(cfg: CfgNode) -> None:
    """Limits loader workers to the number of cores, in place; more would only wait."""
    cores, workers = available_cores(), cfg.DATALOADER.NUM_WORKERS
    if workers > cores:
        cfg.DATALOADER.NUM_WORKERS = cores
        logger.info("DATALOADER.NUM_WORKERS %d -> %d, the cores of this machine", workers, cores)

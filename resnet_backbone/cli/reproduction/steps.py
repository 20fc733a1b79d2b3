"""From a plan to commands, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from resnet_backbone import __version__
from resnet_backbone.cli.reproduction.hashing import config_files, digest, file_digest, tree_digest
from resnet_backbone.cli.reproduction.plan import Network, Plan, PlanError, Training

STAGES = ("data", "pretrain", "bn", "convert", "detect", "improve", "report")
"""Data set; classifier; true BN statistics; Detectron2's format; detectors; test-time
improvements; tables and pictures."""


@dataclass(frozen=True)
class Step:
    """One command with a folder of its own, named after everything that it depends on.

    Attributes:
        stage: of :data:`STAGES`.
        name: of the folder, without its hash.
        output: folder of all steps.
        command: tool of tools/ and its arguments; ``{here}`` is the step's own folder.
        inputs: steps whose folders the command reads.
        depends: digests of files and data that it reads beside these.
        places: paths of those that the command names; only their digests enter the key.
        product: file in the folder that later steps read and that proves it complete.
        training: what the hours are stated for.
    """

    stage: str
    name: str
    output: Path
    command: tuple[str, ...]
    product: str
    inputs: tuple[Step, ...] = ()
    depends: tuple[str, ...] = ()
    places: tuple[Path, ...] = ()
    training: Training | None = field(default=None, compare=False)

    @cached_property
    def key(self) -> str:
        """Ten digits of the hash of all that the result depends on; places do not enter."""
        words = list(self.command)
        for place in (self.output, *self.places):
            words = [word.replace(str(place), "") for word in words]
        keys = [step.key for step in self.inputs]
        return digest([__version__, words, keys, self.depends])[:10]

    @cached_property
    def folder(self) -> Path:
        return self.output / f"{self.name}-{self.key}"

    @property
    def path(self) -> Path:
        """The product."""
        return self.folder / self.product

    def words(self) -> list[str]:
        return [word.replace("{here}", str(self.folder)) for word in self.command]


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        root: of the project: configs are relative to it, and commands run there.
        output: folder of everything.
        weights: file of each network that is not pre-trained.
        preprocessing: their input, where they do not carry it.
        imagenet, datasets: folders of official data.
        data_may_be_absent: for plans that are only shown; the keys of steps that read the data
            are then not those of a run.
        num_gpus: GPUs, or processes.
        classification, detection: overrides for every training of the kind.
    """

    root: Path
    output: Path
    weights: Mapping[str, Path] = field(default_factory=dict)
    preprocessing: Mapping[str, str] = field(default_factory=dict)
    imagenet: Path | None = None
    datasets: Path | None = None
    data_may_be_absent: bool = False
    num_gpus: int = 1
    classification: Sequence[str] = ()
    detection: Sequence[str] = ()


def build_steps(plan: Plan, options: Options) -> list[Step]:
    """All steps of a plan; those of earlier stages come first.

    Raises:
        PlanError: weights for a network that the plan does not have, neither weights nor data to
            train a network, unreadable files.
    """
    for name in (*options.weights, *options.preprocessing):
        if name not in plan.networks:
            raise PlanError(f"the plan has no {name}; its networks: {', '.join(plan.networks)}")
    return list(_Builder(plan, options).steps())


class _Builder:
    def __init__(self, plan: Plan, options: Options):
        self.plan, self.options, self.output = plan, options, options.output
        self.data_step: Step | None = None

    def steps(self) -> Iterator[Step]:
        plan = self.plan
        if plan.data == "built-in":
            self.data_step = self.step("data", "data", ("make_quickstart_data.py", "--output",
                "{here}/scenes"), "scenes/dataset.json")  # fmt: skip
            yield self.data_step
        prepared: dict[str, tuple[Step, ...]] = {}
        for name, network in plan.networks.items():
            prepared[name] = tuple(self.prepare(name, network))
        for stage in ("pretrain", "bn", "convert"):
            yield from (s for found in prepared.values() for s in found if s.stage == stage)
        detectors = {
            name: [self.detect(name, network, prepared[name], seed) for seed in plan.seeds]
            for name, network in plan.networks.items()
        }
        yield from (step for seeds in detectors.values() for step in seeds)
        found = [
            list(self.improve(name, prepared[name], detectors[name])) for name in plan.networks
        ]
        yield from (step for steps in found for step in steps[:-1])
        rows = [steps[-1] for steps in found]
        yield from rows
        yield self.report(detectors, rows)

    def step(self, stage: str, name: str, command: tuple[str, ...], product: str, **rest) -> Step:
        return Step(stage, name, self.output, command, product, **rest)

    # -- weights ----------------------------------------------------------------------------------

    def prepare(self, name: str, network: Network) -> Iterator[Step]:
        """Classifier, statistics, conversion; nothing where weights are given."""
        if name in self.options.weights:
            return
        training = network.pretrain
        if training is None:
            raise PlanError(f"{name} is not pre-trained by this plan: give --weights {name}=FILE")
        # the stage "bn" makes them
        overrides = ("train.recompute_bn=False",) if network.batch_norm else ()
        classifier = weights = self.pretrain(name, training, overrides)
        yield classifier
        if network.batch_norm:
            weights = self.step(
                "bn",
                f"bn_{name}",
                ("recompute_bn.py", "--run", str(classifier.folder), "--output",
                 "{here}/true_bn.safetensors"),
                "true_bn.safetensors",
                inputs=(classifier,),
            )  # fmt: skip
            yield weights
        yield self.step(
            "convert",
            f"convert_{name}",
            ("convert_weights.py", "convert", str(weights.path), "{here}/weights.pkl", "--to",
             "detectron2", "--overwrite"),
            "weights.pkl",
            inputs=(weights,),
        )  # fmt: skip

    def pretrain(self, name: str, training: Training, extra: tuple[str, ...]) -> Step:
        overrides, depends, places = [*training.overrides, *extra], [], []
        if self.plan.data == "official":
            if self.options.imagenet is None:
                raise PlanError(
                    f"{name}: pre-training needs --imagenet DIR; or give --weights {name}=FILE"
                )
            overrides.append(f"data.root={self.options.imagenet}")
            depends.append(self.data_digest(self.options.imagenet))
            places.append(self.options.imagenet)
        command = (
            *("train_classifier.py", "--config-file", *self.configs(training)),
            *("--output-dir", "{here}", "--resume", *self.processes(training)),
            *overrides,
            *self.options.classification,
        )
        return self.step(
            "pretrain",
            f"pretrain_{name}",
            command,
            "final.safetensors",
            depends=(*depends, *self.config_digests(training)),
            places=tuple(places),
            training=training,
        )

    # -- detectors --------------------------------------------------------------------------------

    def detect(
        self, name: str, network: Network, prepared: tuple[Step, ...], seed: int, extra=()
    ) -> Step:
        training, given = network.detect, self.options.weights.get(name)
        inputs = [self.data_step] if self.data_step else []
        depends = list(self.config_digests(training))
        if given is None:
            inputs.append(prepared[-1])
            source = prepared[-1].path
        else:
            depends.append(file_digest(given))
            source = given
        if self.data_step is None and self.options.datasets is not None:
            folders = (self.options.datasets / name for name in self.plan.datasets)
            depends += map(self.data_digest, folders)
        stated = self.options.preprocessing.get(name)
        command = (
            *("train_net.py", "--config-file", *self.configs(training)),
            *("--weights", str(source), "--output-dir", "{here}", "--resume"),
            *self.processes(training),
            *self.scenes(),
            *training.overrides,
            *(("RESNET_BACKBONE.WEIGHTS_PREPROCESSING", stated) if stated else ()),
            *extra,
            *self.options.detection,
            *("SEED", str(seed)),
        )
        return self.step(
            "detect",
            f"detect_{name}{'_context' if extra else ''}_seed{seed}",
            command,
            "results.json",
            inputs=tuple(inputs),
            depends=tuple(depends),
            places=(given,) if given else (),
            training=training,
        )

    def improve(
        self, name: str, prepared: tuple[Step, ...], detectors: Sequence[Step]
    ) -> Iterator[Step]:
        """The detector with context, where its row is asked for, then all rows."""
        is_last = name == list(self.plan.networks)[-1]
        rows = self.plan.improvements if is_last else ("baseline",)
        inputs = [detectors[0]]
        command = ["evaluate_detector.py", "--run", str(detectors[0].folder)]
        if set(rows) - {"baseline", "refinement"}:
            extra = ("RESNET_BACKBONE.GLOBAL_CONTEXT", "True")
            context = self.detect(
                name, self.plan.networks[name], prepared, self.plan.seeds[0], extra
            )
            yield context
            command += ["--context-run", str(context.folder)]
            inputs.append(context)
        for other in detectors[1:] if "ensemble" in rows else ():
            command += ["--ensemble-run", str(other.folder)]
            inputs.append(other)
        yield self.step(
            "improve",
            f"improve_{name}",
            (*command, "--rows", *rows, *self.scenes(), "--output", "{here}"),
            "results.json",
            inputs=tuple(inputs),
        )

    def report(self, detectors: Mapping[str, Sequence[Step]], rows: Sequence[Step]) -> Step:
        runs = tuple(step for seeds in detectors.values() for step in seeds)
        command = ["report.py", "detection"]
        for step in runs:
            command += ["--run", str(step.folder)]
        for step in rows:
            command += ["--rows", str(step.path)]
        if self.plan.note:
            command += ["--note", self.plan.note]
        command += ["--output", "{here}/detection.md"]
        return self.step("report", "report", tuple(command), "detection.md", inputs=(*runs, *rows))

    # -- words of commands ------------------------------------------------------------------------

    def configs(self, training: Training) -> list[str]:
        return list(training.config)

    def config_digests(self, training: Training) -> Iterator[str]:
        for path in training.config:
            for file in config_files(self.options.root / path):
                yield file_digest(file)

    def data_digest(self, folder: Path) -> str:
        if self.options.data_may_be_absent and not folder.is_dir():
            return "absent"
        return tree_digest(folder)

    def processes(self, training: Training) -> tuple[str, ...]:
        count = min(self.options.num_gpus, training.batch or self.options.num_gpus)
        return ("--num-gpus", str(count)) if count > 1 else ()

    def scenes(self) -> tuple[str, ...]:
        if self.data_step is None:
            return ()
        folder = str(self.data_step.folder / "scenes")
        return ("--voc-root", folder, "--train-set", "train", "--test-set", "test")

"""Set-up of a run: config, folder, data, weights, and all checks; and its results."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from resnet_backbone.detection.checkpoint.files import find_last_checkpoint
from resnet_backbone.detection.checkpoint.input_check import prepare_weights, require_weights
from resnet_backbone.detection.config import backbone_node, load_configs, saved_values
from resnet_backbone.detection.data.arguments import check_data_arguments, set_up_data
from resnet_backbone.detection.data.sampling import BatchPlan, limit_workers
from resnet_backbone.detection.engine.results import check_results, seed_folder
from resnet_backbone.detection.engine.schedule import (
    check_training,
    follow_processes,
    plan_schedule,
)
from resnet_backbone.detection.evaluation import evaluation_folder
from resnet_backbone.detection.evaluation.operating import OPERATING_POINTS
from resnet_backbone.detection.inference.detector import read_switches
from resnet_backbone.detection.inference.predictor import Speed, check_ensemble, run_config
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.files import find_config, write_json
from resnet_backbone.runtime.launch import local_size
from resnet_backbone.runtime.records import (
    CONFIG,
    RESULTS,
    command_line,
    date,
    flatten,
    hardware,
    read_results,
    say_nothing_to_resume,
    source_revision,
    versions,
)

logger = logging.getLogger(__name__)

LOG = "log.txt"  # Detectron2's, in the run folder

# Keys that do not affect a run's results; all others may.
PLACES = ("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "RESNET_BACKBONE.LOGGERS")
# SOLVER keys whose values are restored from checkpoints, so changing them has no effect.
KEPT = "BASE_LR BIAS_LR_FACTOR MOMENTUM NESTEROV WEIGHT_DECAY WEIGHT_DECAY_BIAS WEIGHT_DECAY_NORM"


@dataclass
class RunPlan:
    """The command line and its configs, before data and weights are read."""

    args: argparse.Namespace  # of tools/train_net.py
    cfg: CfgNode  # config file and overrides, with the run's folder and seed
    planned: CfgNode  # the config file alone, whose SOLVER the linear rule starts from
    resume: bool  # whether to resume from the folder's last checkpoint
    lines: list[str]  # messages on the config

    @property
    def given(self) -> list[str]:
        """Keys set by the user."""
        return self.args.opts[::2]


def read_plan(args: argparse.Namespace) -> RunPlan:
    """Reads the plan from a command line, in one process for all; errors as in ``load_config``."""
    run = evaluated_run(args)
    lines = []
    if run:
        cfg = planned = run_config(run, args.opts)
        lines.append(f"all keys but those of the command line are those of {run}/{CONFIG}")
        saved = _saved_config(run)
        for key, value in zip(args.opts[::2], args.opts[1::2], strict=True):
            if key in saved and str(saved[key]) != value:
                lines.append(f"{key} {value} of the command line, the run had {saved[key]}")
        args.config_file, args.weights = os.path.join(run, CONFIG), None
    elif args.config_file:
        args.config_file = str(find_config(args.config_file, "detection"))  # Detectron2 reads it
        cfg, planned = load_configs(args.config_file, args.opts)
    elif args.eval_only and args.output_dir:
        raise UsageError(f"{args.output_dir} is not a run folder: it has no {CONFIG}")
    else:
        raise UsageError(
            "--config-file is missing; only --eval-only with a run folder works without it"
        )
    cfg.OUTPUT_DIR = args.output_dir or run or cfg.OUTPUT_DIR
    if args.seed_run is not None:
        cfg.OUTPUT_DIR, cfg.SEED = seed_folder(cfg.OUTPUT_DIR, args.seed_run), args.seed_run
        cfg.TEST.EXPECTED_RESULTS = []  # one seed's deviation must not stop the others
    if args.eval_only:  # keeps the run's own config and results
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "eval")
    return RunPlan(args, cfg, planned, args.resume or args.seed_run is not None, lines)


def evaluated_run(args: argparse.Namespace) -> str:
    """Returns the folder of the run that ``--eval-only`` evaluates with its own config, or "".

    It is the folder of the weights, or without weights the output folder.
    """
    if not args.eval_only:
        return ""
    given = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    weights = args.weights or given.get("MODEL.WEIGHTS", "")
    folder = os.path.dirname(weights) or "." if weights else args.output_dir
    if not folder or not os.path.isfile(os.path.join(folder, CONFIG)):
        return ""
    if args.weights:
        given["MODEL.WEIGHTS"] = args.weights
    elif not weights:
        given.pop("MODEL.WEIGHTS", None)
    if len(args.opts) % 2 == 0:  # otherwise load_configs reports the error
        args.opts = [word for pair in given.items() for word in pair]
    return folder


def prepare_run(plan: RunPlan) -> CfgNode | None:
    """Prepares the final config of a run, and writes it to OUTPUT_DIR/config.yaml.

    Every process calls it. Cheap checks come first, then weights are opened, then data are read. An
    existing config file is replaced only after all checks have passed.

    Returns:
        The config, frozen; None if the run has already ended.
    """
    if dist.is_initialized():  # also by torchrun for a single process
        comm.create_local_process_group(local_size())
    args, cfg, trains = plan.args, plan.cfg, not plan.args.eval_only
    last = check_folder(cfg.OUTPUT_DIR, plan.resume) if trains else ""
    if trains and args.resume and not last and comm.is_main_process():
        say_nothing_to_resume(cfg.OUTPUT_DIR)
    scaled = []
    if trains:
        if not last and not args.weights:
            refuse_frozen_random(cfg)
        check_training(cfg)
        scaled = follow_processes(cfg, comm.get_world_size())
        BatchPlan.from_config(cfg)  # refuses batches that do not divide
    read_switches(cfg)
    check_data_arguments(cfg, args)  # before weights are fetched
    lines = prepare_weights(cfg, given=plan.given, weights=args.weights or "", resume_from=last)
    if not trains:
        require_weights(cfg)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="resnet_backbone", abbrev_name="rb")
    for line in plan.lines:
        logger.info("config: %s", line)
    for line in lines:
        logger.info("weights: %s", line)
    num_images = set_up_data(cfg, args)
    check_ensemble(cfg)
    if trains:
        for line in [*scaled, *plan_schedule(cfg, plan.planned, plan.given, num_images)]:
            logger.info("schedule: %s", line)
    cfg.RESNET_BACKBONE.REFERENCE_BATCH = 0  # done: config.yaml must not be scaled again
    limit_workers(cfg)
    if cfg.SEED < 0:  # records the drawn seed in config.yaml and results.json
        drawn = comm.shared_random_seed()
        seed = _saved_config(cfg.OUTPUT_DIR).get("SEED", drawn) if plan.resume else drawn
        cfg.SEED = comm.all_gather(seed)[0]  # machines may see different states of the file
    cfg.freeze()
    if trains and has_ended(cfg, last, args.seed_run is not None):
        logger.info("%s: the run has ended, see %s", cfg.OUTPUT_DIR, RESULTS)
        check_results(cfg, read_results(cfg.OUTPUT_DIR)["results"])
        return None
    comm.synchronize()  # every process has read config.yaml
    with _quiet_screen(cfg.OUTPUT_DIR):
        default_setup(cfg, args)  # writes config.yaml; log.txt gets the config and the environment
    logger.info("config: %s; environment: %s", Path(cfg.OUTPUT_DIR, CONFIG), LOG)
    return cfg


@contextmanager
def _quiet_screen(folder: str) -> Iterator[None]:
    """Context in which Detectron2's loggers write to the run's log.txt but not to the screen."""
    options = dict(distributed_rank=comm.get_rank())  # as in default_setup, for the same cache
    loggers = setup_logger(folder, **options, name="fvcore"), setup_logger(folder, **options)
    shown = [
        handler
        for one in loggers
        for handler in one.handlers
        if getattr(handler, "stream", None) is sys.stdout
    ]
    levels = [handler.level for handler in shown]
    for handler in shown:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler, level in zip(shown, levels, strict=True):
            handler.setLevel(level)


def refuse_frozen_random(cfg: CfgNode) -> None:
    """Refuses frozen layers without weights, which would silently spoil a training."""
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    key, norm = "MODEL.RESNETS.NORM", cfg.MODEL.RESNETS.NORM
    if "vgg" in cfg.MODEL.BACKBONE.NAME:
        key, norm = "RESNET_BACKBONE.VGG.NORM", backbone_node(cfg).VGG.NORM
    found, mend = [], []
    if freeze_at > 0:
        found.append(f"the first {freeze_at} stages are frozen (MODEL.BACKBONE.FREEZE_AT)")
        mend.append("MODEL.BACKBONE.FREEZE_AT 0")
    if norm == "FrozenBN":
        found.append(f"{key} is FrozenBN")
        mend.append(f"{key} BN")
    if found and not cfg.MODEL.WEIGHTS:
        raise UsageError(
            f"MODEL.WEIGHTS is empty but {' and '.join(found)}: random layers would never learn; "
            f"give weights, or set {' '.join(mend)}"
        )


def check_folder(folder: str, resume: bool) -> str:
    """Returns the checkpoint from which a run in this folder resumes, or "" if it starts."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UsageError(f"{folder} is a file: --output-dir must be a folder")
    last = find_last_checkpoint(folder)
    found = comm.all_gather(last and os.path.isfile(last))
    if not resume and found[0]:
        raise UsageError(
            f"{folder} holds a run: continue it with --resume, or choose another --output-dir"
        )
    if not all(found) and any(found):
        raise UsageError(f"--resume: {folder} must be the same on every machine, on a shared disk")
    if last and not found[0]:
        raise UsageError(f"{folder}/last_checkpoint names {last}, which is missing")
    return last


def has_ended(cfg: CfgNode, last: str, is_seed: bool = False) -> bool:
    """Whether the folder has the results of this config; logs changed keys or refuses them.

    A run whose last evaluation failed has not ended: resumed, it evaluates again. Keys unknown to
    the version that started the run are ignored. Runs of several seeds must share one config; in
    other runs, some keys cannot change on resume.
    """
    before = _saved_config(cfg.OUTPUT_DIR) if last else {}
    after = saved_values(cfg)
    if not before:
        return False
    common = [key for key in after if key in before and key not in PLACES]
    changed = [key for key in common if before[key] != after[key]]
    if not changed:
        found = read_results(cfg.OUTPUT_DIR)
        is_same = found.get("config_sha256") == config_digest(before)
        return is_same and "evaluation_error" not in found
    refused = [key for key in changed if key.removeprefix("SOLVER.") in KEPT.split()]
    if is_seed or refused:
        raise UsageError(
            f"{cfg.OUTPUT_DIR} was started with another {', '.join(refused or changed)}: "
            "continue with the same, or choose another --output-dir"
        )
    for key in changed:
        logger.warning("resumed with another %s: %s -> %s", key, before[key], after[key])
    return False


def config_digest(content: dict[str, Any]) -> str:
    """Returns a digest of ``saved_values`` that is equal for configs of the same run."""
    kept = {key: value for key, value in content.items() if key not in PLACES}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _saved_config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, CONFIG)
    if not os.path.isfile(path):
        return {}
    try:
        return dict(flatten(yaml.safe_load(Path(path).read_text("utf-8"))))
    except (yaml.YAMLError, AttributeError) as error:  # a power cut leaves a part of it, or nothing
        raise UsageError(
            f"{path} is damaged: delete it, and resume with the same command; if that gives no "
            f"SEED, add the run's, which is in {LOG}"
        ) from error


def write_results(cfg: CfgNode, results: dict, speed: Speed | None, **training: Any) -> None:
    """Writes OUTPUT_DIR/results.json with provenance and results, on the main process.

    NaN becomes null. `speed` is the evaluation's in this process; `training` has further entries.
    Operating points are read from the folders of the test sets.
    """
    if not comm.is_main_process():
        return
    content = {
        "command": command_line(),
        "train": list(cfg.DATASETS.TRAIN),
        "test": list(cfg.DATASETS.TEST),
        "weights": cfg.MODEL.WEIGHTS,
        "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "seed": cfg.SEED,
        "processes": comm.get_world_size(),
        **(speed._asdict() if speed else dict.fromkeys(Speed._fields)),
        "test_precision": cfg.RESNET_BACKBONE.TEST.PRECISION,
        "test_engine": cfg.RESNET_BACKBONE.TEST.ENGINE,
        "hardware": hardware(torch.device(cfg.MODEL.DEVICE)),
        "versions": versions(),
        "revision": source_revision(),
        "date": date(),
        **training,
        "results": results,
    }
    if cfg.RESNET_BACKBONE.TEST.OPERATING_POINTS and results:
        folders = [evaluation_folder(cfg, name) for name in cfg.DATASETS.TEST]
        files = [Path(folder, OPERATING_POINTS) for folder in folders]
        points = {f.parent.name: json.loads(f.read_text("utf-8")) for f in files if f.is_file()}
        content["operating_points"] = points
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)  # NaN
    path = os.path.join(cfg.OUTPUT_DIR, RESULTS)
    write_json(path, content, allow_nan=False)
    logger.info("results are in %s", path)
    if training.get("iterations"):
        run = shlex.quote(cfg.OUTPUT_DIR)
        logger.info("next: resnet-backbone demo --run %s --input IMAGES --output drawn", run)

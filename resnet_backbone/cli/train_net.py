#!/usr/bin/env python
"""Train and evaluate a detector with one of the paper's backbones.

On your own data in PASCAL VOC layout, from ImageNet weights:

  python tools/train_net.py --config-file configs/detection/voc/faster_rcnn_R_50_FPN.yaml \\
      --voc-root VOCdevkit/VOC2007 --train-set trainval --test-set test --output-dir output/r50 \\
      --weights detectron2://ImageNetPretrained/MSRA/R-50.pkl

--weights takes over the input that the weights were trained on (INPUT.FORMAT, MODEL.PIXEL_MEAN,
MODEL.PIXEL_STD, MODEL.RESNETS.STRIDE_IN_1X1): it is MODEL.WEIGHTS FILE with
RESNET_BACKBONE.WEIGHTS_INPUT set. With MODEL.WEIGHTS alone these keys are checked, and a config
that differs is refused with the line to write. FILE is what tools/train_classifier.py wrote; a
.pth, .pkl, .safetensors or folder of torchvision, timm, Hugging Face, Caffe2 or Detectron2; a name
such as torchvision://resnet50/IMAGENET1K_V2, timm://resnet50.a1_in1k, hf://microsoft/resnet-50,
detectron2://... or https://...; or a whole detector's checkpoint, also of other classes. A file
that does not say its input needs RESNET_BACKBONE.WEIGHTS_PREPROCESSING msra, caffe_vgg or
torchvision:

  python tools/train_net.py --config-file configs/detection/voc/faster_rcnn_R_50_FPN.yaml \\
      --voc-root ... --weights resnet50_msra.safetensors RESNET_BACKBONE.WEIGHTS_PREPROCESSING msra

On COCO-style JSON:

  python tools/train_net.py --config-file configs/detection/coco/faster_rcnn_R_50_FPN.yaml \\
      --coco-json train.json val.json --image-root train_images val_images

Evaluate only, with --eval-only MODEL.WEIGHTS FILE, or --weights FILE to take over its input.
Anything in the config can be overridden by trailing pairs, for example
SOLVER.IMS_PER_BATCH 4 (learning rate and iterations follow by the linear rule),
SOLVER.AMP.ENABLED True (mixed precision; bf16 on a CPU), RESNET_BACKBONE.ACCUMULATE 8 (16 images
per batch, two at a time), RESNET_BACKBONE.EPOCHS 12,
TEST.EVAL_PERIOD 1000 RESNET_BACKBONE.BEST_METRIC bbox/AP50 RESNET_BACKBONE.EARLY_STOP 5 (keeps
model_best.pth, ends after five evaluations that were not better).

--resume goes on after an interruption with exactly the images, random numbers and rates that an
uninterrupted run would have had. SIGTERM, SIGUSR1 and Ctrl-C write a checkpoint after the iteration
at hand and exit with status 75; a second Ctrl-C interrupts at once. Wrong input exits with 2,
results that are not those of TEST.EXPECTED_RESULTS with 1, after results.json was written.

Several seeds, one after the other, each in its own folder, with mean and spread in seeds.json:

  python tools/train_net.py ... --output-dir output/r50 --seeds 1 2 3

Several processes; the batch is divided among them:

  python tools/train_net.py ... --num-gpus 8
  python tools/train_net.py ... --num-gpus 8 --num-machines 2 --machine-rank 0 \\
      --dist-url tcp://first-machine:29500
  torchrun --nproc-per-node 8 tools/train_net.py ...
  python tools/train_net.py ... --num-processes 2 MODEL.DEVICE cpu
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

import torch

from resnet_backbone.detection.data.arguments import (
    add_data_arguments,
    check_data_arguments,
    set_up_data,
)
from resnet_backbone.detection.engine.command_line import (
    UsageError,
    load_config,
    one_line_errors,
    refuse_frozen_random,
    take_back_overrides,
)
from resnet_backbone.detection.engine.launch import add_launch_arguments, plan_launch, run_processes
from resnet_backbone.detection.engine.run_folder import (
    check_folder,
    config_digest,
    has_ended,
    saved_results,
    saved_seed,
)
from resnet_backbone.detection.engine.seeds import read_seeds, seed_folder, train_seeds
from resnet_backbone.detection.evaluation.expected import (
    UnexpectedResults,
    check_expectations,
    check_results,
)
from resnet_backbone.runtime.configs import find_config
from resnet_backbone.runtime.files import write_json

logger = logging.getLogger("resnet_backbone.detection.train_net")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, help="a file, or a name such as voc/faster_rcnn_R_50_FPN"
    )
    parser.add_argument("--output-dir", help="run folder (default: OUTPUT_DIR of the config)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate --weights FILE or MODEL.WEIGHTS, without these the run folder's "
        "model_final.pth; results go to the folder eval inside the run folder",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="MODEL.WEIGHTS FILE, and take over the input that these weights were trained on",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        metavar="N",
        help="one run for each of these seeds, in seed_N inside the run folder; what is complete "
        "is left as it is, what was interrupted goes on",
    )
    parser.add_argument("--seed-run", type=int, help=argparse.SUPPRESS)  # one run of --seeds
    add_launch_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    take_back_overrides(args, "seeds")
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    return args


def set_up(args: argparse.Namespace):
    """The final config of a run, printed and saved as OUTPUT_DIR/config.yaml.

    Returns:
        None where the run has ended already.
    """
    from detectron2.engine import default_setup
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from resnet_backbone.detection.checkpoint.input_check import prepare_weights, require_weights
    from resnet_backbone.detection.data.sampling import BatchPlan, limit_workers
    from resnet_backbone.detection.engine.schedule import (
        check_training,
        follow_processes,
        plan_schedule,
    )
    from resnet_backbone.detection.inference import check_ensemble, read_switches

    cfg, given = load_config(args.config_file, args.opts), args.opts[::2]
    if args.output_dir:
        cfg.OUTPUT_DIR = args.output_dir
    if args.seed_run is not None:
        cfg.OUTPUT_DIR, cfg.SEED = seed_folder(cfg.OUTPUT_DIR, args.seed_run), args.seed_run
        args.resume = True
        cfg.TEST.EXPECTED_RESULTS = []  # of one seed, which must not keep the others from running
    own = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if args.eval_only and not args.weights and "MODEL.WEIGHTS" not in given:
        cfg.MODEL.WEIGHTS = own if os.path.isfile(own) else cfg.MODEL.WEIGHTS
    if args.eval_only:  # a run's own config and results stay as they are
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "eval")
    last = "" if args.eval_only else check_folder(cfg.OUTPUT_DIR, args.resume)
    scaled = []
    if not args.eval_only:
        if not last and not args.weights:
            refuse_frozen_random(cfg)
        check_training(cfg)
        scaled = follow_processes(cfg, comm.get_world_size())
        BatchPlan.from_config(cfg)
    read_switches(cfg)
    check_data_arguments(cfg, args)  # before weights are fetched
    taken = prepare_weights(cfg, given=given, weights=args.weights or "", resume_from=last)
    if args.eval_only:
        require_weights(cfg)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="resnet_backbone", abbrev_name="rb")
    for line in taken:
        logger.info("weights: %s", line)
    if args.resume and not last and args.seed_run is None:
        logger.info("--resume: %s has no checkpoint, the run starts", cfg.OUTPUT_DIR)
    num_images = set_up_data(cfg, args)
    check_ensemble(cfg)
    if not args.eval_only:
        planned = load_config(args.config_file, [])
        scaled += plan_schedule(cfg, planned, given, num_images)
        for line in scaled:
            logger.info("schedule: %s", line)
    cfg.RESNET_BACKBONE.REFERENCE_BATCH = 0  # done: config.yaml must not be scaled again
    limit_workers(cfg)
    if cfg.SEED < 0:  # so that config.yaml and results.json say what was drawn
        drawn = comm.shared_random_seed()
        cfg.SEED = saved_seed(cfg.OUTPUT_DIR, drawn) if args.resume else drawn
    cfg.freeze()
    if not args.eval_only and has_ended(cfg, last, is_seed=args.seed_run is not None):
        logger.info("%s: the run has ended, see results.json", cfg.OUTPUT_DIR)
        check_results(cfg, saved_results(cfg.OUTPUT_DIR))
        return None
    comm.synchronize()  # every process has read config.yaml
    default_setup(cfg, args)  # writes config.yaml: only what has passed so far replaces one
    return cfg


def write_results(cfg, results: dict, speed, **training) -> None:
    """OUTPUT_DIR/results.json: what was run and what came out; null where there is no number.

    Args:
        speed: of the evaluation in this process, or None.
    """
    from detectron2.utils import comm

    from resnet_backbone.runtime.provenance import command_line, hardware

    path = os.path.join(cfg.OUTPUT_DIR, "results.json")
    content = {
        "command": command_line(),
        "train": list(cfg.DATASETS.TRAIN),
        "test": list(cfg.DATASETS.TEST),
        "weights": cfg.MODEL.WEIGHTS,
        "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "seed": cfg.SEED,
        "processes": comm.get_world_size(),
        "seconds_per_image": speed and speed.seconds_per_image,
        "images_at_a_time": speed and speed.images_at_a_time,
        "hardware": hardware(torch.device(cfg.MODEL.DEVICE)),
        **training,
        "results": results,
    }
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)  # NaN
    write_json(path, content, allow_nan=False)
    logger.info("results are in %s", path)


def train(cfg, resume: bool) -> None:
    from detectron2.utils import comm

    from resnet_backbone.detection.engine.signals import StopRequest
    from resnet_backbone.detection.engine.trainer import Trainer

    unexpected = None
    with StopRequest() as stop:
        trainer = Trainer(cfg, stop)
        trainer.resume_or_load(resume=resume)
        try:
            trainer.train()
        except UnexpectedResults as error:  # the run is complete
            unexpected = error
    if comm.is_main_process():
        write_results(
            trainer.cfg,
            trainer.results,
            trainer.evaluation.speed,
            iterations=trainer.iter,
            ended_early=trainer.evaluation.has_ended,
            best=trainer.evaluation.best,
            accumulate=cfg.RESNET_BACKBONE.ACCUMULATE,
            config_sha256=config_digest(cfg),
        )
    if unexpected:
        comm.synchronize()  # the launcher ends the others as soon as one fails
        raise unexpected


def evaluate(cfg) -> None:
    from detectron2.utils import comm

    from resnet_backbone.detection.engine.trainer import Trainer
    from resnet_backbone.detection.inference.predictor import load_detector

    model = Trainer.build_model(cfg)
    load_detector(cfg, model)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        if results:
            write_results(cfg, results, Trainer.speed, iterations=None)
        check_results(cfg, results or {})


def run(args: argparse.Namespace) -> None:
    """What each process does."""
    cfg = set_up(args)
    if cfg is None:
        return
    if args.eval_only:
        evaluate(cfg)
    else:
        train(cfg, args.resume)


def run_seeds(args: argparse.Namespace, cfg) -> None:
    if args.eval_only or "SEED" in args.opts[::2]:
        raise UsageError("--seeds trains, with the seeds that it names: no --eval-only, no SEED")
    if "WORLD_SIZE" in os.environ or args.num_machines > 1:
        raise UsageError("--seeds starts processes on one machine, by --num-gpus: no torchrun")
    check_expectations(cfg)
    seeds, output = read_seeds(args.seeds), args.output_dir or cfg.OUTPUT_DIR
    train_seeds("resnet_backbone.cli.train_net", args.arguments, seeds, output)
    wrong = []
    for seed in seeds:
        try:
            check_results(cfg, saved_results(seed_folder(output, seed)))
        except UnexpectedResults as error:
            wrong.append(f"seed {seed}: {error}")
    if wrong:
        raise UnexpectedResults("; ".join(wrong))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.config_file = str(find_config(args.config_file, "detection"))  # Detectron2 reads it too
    cfg = load_config(args.config_file, args.opts)
    launch = plan_launch(args, cfg.MODEL.DEVICE)
    if args.seeds and args.seed_run is None:
        run_seeds(args, cfg)
    else:
        run_processes(launch, run, args)


if __name__ == "__main__":
    main()

"""Train and evaluate a detector with one of the paper's backbones.

On your own data in PASCAL VOC layout, from ImageNet weights:

  resnet-backbone train-net --config-file voc/faster_rcnn_R_50_FPN \\
      --voc-root VOCdevkit/VOC2007 --train-set trainval --test-set test --output-dir output/r50 \\
      --weights detectron2://ImageNetPretrained/MSRA/R-50.pkl

--weights also sets the input that the weights were trained on (INPUT.FORMAT, MODEL.PIXEL_MEAN,
MODEL.PIXEL_STD, MODEL.RESNETS.STRIDE_IN_1X1). It is short for MODEL.WEIGHTS FILE with
RESNET_BACKBONE.WEIGHTS_INPUT set. With MODEL.WEIGHTS alone, these keys are checked, and the error
says what to write. FILE is one of these:

  - what train-classifier wrote, or the checkpoint of a whole detector, also of other classes;
  - a .pth, .pkl, .safetensors, or folder of torchvision, timm, Hugging Face, Caffe2, or Detectron2;
  - a name such as torchvision://resnet50/IMAGENET1K_V2, timm://resnet50.a1_in1k,
    hf://microsoft/resnet-50, detectron2://..., or https://...

A file that does not state its input needs RESNET_BACKBONE.WEIGHTS_PREPROCESSING msra, caffe_vgg, or
torchvision.

On data in COCO's format:

  resnet-backbone train-net --config-file coco/faster_rcnn_R_50_FPN \\
      --coco-json train.json val.json --image-root train_images val_images

KEY VALUE pairs at the end override the config, for example:

  SOLVER.IMS_PER_BATCH 4            learning rate and iterations follow by the linear rule
  SOLVER.AMP.ENABLED True           mixed precision; bf16 on a CPU
  RESNET_BACKBONE.ACCUMULATE 8      16 images per batch, two at a time
  RESNET_BACKBONE.EPOCHS 12         the length of the training in passes over the data
  TEST.EVAL_PERIOD 1000 RESNET_BACKBONE.BEST_METRIC bbox/AP50 RESNET_BACKBONE.EARLY_STOP 5
                                    keep model_best.pth; stop after five evaluations without a
                                    better one

SIGTERM, SIGUSR1, and Ctrl-C write a checkpoint after the current iteration and exit with status 75.
A second Ctrl-C interrupts at once. --resume continues with the images, random numbers, and rates of
an uninterrupted run. Other statuses: 1, results differ from TEST.EXPECTED_RESULTS (results.json is
written), or the evaluation failed; 2, wrong input; 3, the training diverged.

Several seeds run one after the other, each in its own folder. seeds.json has their mean and spread.
Several processes share the batch:

  resnet-backbone train-net ... --output-dir output/r50 --seeds 1 2 3
  resnet-backbone train-net ... --num-gpus 8
  resnet-backbone train-net ... --num-gpus 8 --num-machines 2 --machine-rank 0 \\
      --dist-url tcp://first-machine:29500
  torchrun --nproc-per-node 8 -m resnet_backbone.cli.train_net ...
  resnet-backbone train-net ... --num-processes 2 MODEL.DEVICE cpu
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext

from resnet_backbone.cli import CommandParser
from resnet_backbone.detection.config import CfgNode, saved_values, take_back_overrides
from resnet_backbone.detection.data.arguments import add_data_arguments
from resnet_backbone.detection.engine import setup
from resnet_backbone.detection.engine.results import (
    check_expectations,
    check_results,
    read_seeds,
    seed_folder,
    train_seeds,
)
from resnet_backbone.detection.engine.trainer import Trainer, watching
from resnet_backbone.detection.inference.predictor import trained_detector
from resnet_backbone.runtime.errors import (
    EvaluationFailed,
    UnexpectedResults,
    UsageError,
    one_line_errors,
)
from resnet_backbone.runtime.files import in_use
from resnet_backbone.runtime.launch import add_launch_arguments, plan_launch, run_processes
from resnet_backbone.runtime.processes import current_world
from resnet_backbone.runtime.records import read_results
from resnet_backbone.runtime.signals import StopRequest


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", help="a file, or a name: voc/faster_rcnn_R_50_FPN")
    add("--output-dir", help="run folder (default: OUTPUT_DIR of the config)")
    add("--resume", action="store_true", help="continue from the last checkpoint")
    text = "evaluate the run of --output-dir, or --weights FILE; results go to the folder eval"
    add("--eval-only", action="store_true", help=text)
    text = "MODEL.WEIGHTS FILE; also sets the input that these weights were trained on"
    add("--weights", metavar="FILE", help=text)
    text = "one run per seed, in seed_N of the run folder; complete ones are kept"
    add("--seeds", nargs="+", metavar="N", help=text)
    add("--seed-run", type=int, help=argparse.SUPPRESS)  # one run of --seeds
    add_launch_arguments(parser)
    add_data_arguments(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    take_back_overrides(args, "seeds")
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    return args


def train(cfg: CfgNode, resume: bool) -> None:
    unexpected = None
    with StopRequest() as stop:
        trainer = Trainer(cfg, stop)
        trainer.resume_or_load(resume=resume)
        try:
            trainer.train()
        except UnexpectedResults as error:  # the run is complete
            unexpected = error
    evaluation = trainer.evaluation
    facts = {"evaluation_error": trainer.failure} if trainer.failure else {}
    facts |= dict(iterations=trainer.iter, ended_early=evaluation.has_ended, best=evaluation.best)
    facts["accumulate"] = cfg.RESNET_BACKBONE.ACCUMULATE
    facts["config_sha256"] = setup.config_digest(saved_values(cfg))
    setup.write_results(trainer.cfg, trainer.results, evaluation.speed, **facts)
    if trainer.failure:
        raise EvaluationFailed(
            f"the training is complete, its evaluation failed ({trainer.failure}); what was found "
            f"is in {trainer.cfg.OUTPUT_DIR}/inference. Evaluate again: the same command with "
            "--resume"
        )
    if unexpected:
        stop.world.barrier()  # the launcher ends the other processes when one fails
        raise unexpected


def evaluate(cfg: CfgNode) -> None:
    with StopRequest() as stop, watching(stop) as watch:
        results = Trainer.test(cfg, trained_detector(cfg))
    if results:
        setup.write_results(cfg, results, watch.speed, iterations=None)
    if current_world().is_main:
        check_results(cfg, results or {})


def work(plan: setup.RunPlan) -> None:
    cfg = setup.prepare_run(plan)
    if cfg is None:
        return
    if plan.args.eval_only:
        evaluate(cfg)
        return
    with in_use(cfg.OUTPUT_DIR) if current_world().is_main else nullcontext():
        train(cfg, plan.resume)


def run_seeds(args: argparse.Namespace, cfg: CfgNode) -> None:
    if args.eval_only or "SEED" in args.opts[::2]:
        raise UsageError("--seeds names the seeds of trainings: leave out --eval-only and SEED")
    if "WORLD_SIZE" in os.environ or args.num_machines > 1:
        raise UsageError("--seeds starts processes on one machine, by --num-gpus: no torchrun")
    check_expectations(cfg)
    seeds, output = read_seeds(args.seeds), cfg.OUTPUT_DIR
    train_seeds("resnet_backbone.cli.train_net", args.arguments, seeds, output)
    wrong = []
    for seed in seeds:
        try:
            check_results(cfg, read_results(seed_folder(output, seed)).get("results", {}))
        except UnexpectedResults as error:
            wrong.append(f"seed {seed}: {error}")
    if wrong:
        raise UnexpectedResults("; ".join(wrong))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    plan = setup.read_plan(args)
    launch = plan_launch(args, plan.cfg.MODEL.DEVICE, "MODEL.DEVICE cpu")
    if args.seeds and args.seed_run is None:
        run_seeds(args, plan.cfg)
    else:
        run_processes(launch, work, plan)


if __name__ == "__main__":
    main()

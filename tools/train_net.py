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

Continue after an interruption with --resume; evaluate only, with --eval-only MODEL.WEIGHTS FILE,
or --weights FILE to take over its input.
Anything in the config can be overridden by trailing pairs, for example
SOLVER.IMS_PER_BATCH 4 (learning rate and iterations follow by the linear rule) or
SOLVER.AMP.ENABLED True (mixed precision; bf16 on a CPU).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys

import torch

from resnet_backbone.detection.cli import (
    UsageError,
    add_data_arguments,
    load_config,
    one_line_errors,
    refuse_frozen_random,
    set_up_data,
    take_back_overrides,
)

logger = logging.getLogger("resnet_backbone.detection.train_net")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="YAML under configs/detection")
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
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs on this machine (default: 1)")
    parser.add_argument("--dist-url", default="auto", help="tcp:// address for several GPUs")
    add_data_arguments(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    take_back_overrides(args)
    if args.num_gpus > max(1, torch.cuda.device_count()):
        raise UsageError(f"--num-gpus {args.num_gpus}: there are {torch.cuda.device_count()} here")
    return args


def find_last_checkpoint(folder: str) -> str:
    """The checkpoint from which a run goes on; "" where there is none."""
    mark = os.path.join(folder, "last_checkpoint")
    if not os.path.isfile(mark):
        return ""
    with open(mark) as file:
        return os.path.join(folder, file.read().strip())


def set_up(args: argparse.Namespace):
    """The final config of a run, printed and saved as OUTPUT_DIR/config.yaml."""
    from detectron2.engine import default_setup
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from resnet_backbone.detection.handover import prepare_weights
    from resnet_backbone.detection.schedule import scale_schedule

    cfg = load_config(args.config_file, args.opts)
    if args.output_dir:
        cfg.OUTPUT_DIR = args.output_dir
    own = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if args.eval_only and not args.weights and "MODEL.WEIGHTS" not in args.opts[::2]:
        cfg.MODEL.WEIGHTS = own if os.path.isfile(own) else cfg.MODEL.WEIGHTS
    if args.eval_only:  # a run's own config and results stay as they are
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "eval")
    last = find_last_checkpoint(cfg.OUTPUT_DIR) if args.resume and not args.eval_only else ""
    taken = prepare_weights(cfg, given=args.opts[::2], weights=args.weights or "", resume_from=last)
    if not args.eval_only and not last:
        refuse_frozen_random(cfg)
    planned = load_config(args.config_file, [])
    scaled = scale_schedule(cfg, planned, given=args.opts[::2])
    cfg.RESNET_BACKBONE.REFERENCE_BATCH = 0  # done: config.yaml must not be scaled again
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="resnet_backbone", abbrev_name="rb")
    for line in taken:
        logger.info("weights: %s", line)
    if not args.eval_only:
        for line in scaled:
            logger.info("schedule: %s", line)
    set_up_data(cfg, args)
    if cfg.SEED < 0:  # so that config.yaml and results.json say what was drawn
        cfg.SEED = comm.shared_random_seed()
    cfg.freeze()
    default_setup(cfg, args)  # writes config.yaml: only what has passed so far replaces one
    return cfg


def write_results(cfg, results: dict, iterations: int | None) -> None:
    """OUTPUT_DIR/results.json: what was run and what came out; null where there is no number."""
    path = os.path.join(cfg.OUTPUT_DIR, "results.json")
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "train": list(cfg.DATASETS.TRAIN),
        "test": list(cfg.DATASETS.TEST),
        "weights": cfg.MODEL.WEIGHTS,
        "iterations": iterations,
        "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "seed": cfg.SEED,
        "results": results,
    }
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)  # NaN
    with open(path + ".tmp", "w") as file:
        json.dump(content, file, indent=2, allow_nan=False)
    os.replace(path + ".tmp", path)
    logger.info("results are in %s", path)


def run(args: argparse.Namespace) -> None:
    from detectron2.utils import comm

    from resnet_backbone.detection.predictor import load_detector
    from resnet_backbone.detection.trainer import Trainer

    cfg = set_up(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        load_detector(cfg, model)
        results, iterations = Trainer.test(cfg, model), None
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        results, iterations = trainer.results, trainer.max_iter
    if comm.is_main_process() and results:
        write_results(cfg, results, iterations)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    from detectron2.engine import launch

    launch(run, args.num_gpus, dist_url=args.dist_url, args=(args,))


if __name__ == "__main__":
    main()

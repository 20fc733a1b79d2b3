# FCOS (arXiv 1904.01355) R-50-FPN on COCO as a LazyConfig: Detectron2 has no YAML form of it.
#
#   python DETECTRON2/tools/lazyconfig_train_net.py \
#       --config-file configs/detection/coco/fcos_R_50_FPN_lazy.py
#
# Debug: see ../voc/faster_rcnn_R_50_FPN_lazy.py, from which data, schedule and optimizer come.
from detectron2.config import LazyCall as L
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

from ..voc.faster_rcnn_R_50_FPN_lazy import dataloader, lr_multiplier, optimizer, train
from ..voc.faster_rcnn_R_50_FPN_lazy import model as _faster_rcnn

_backbone = _faster_rcnn.backbone  # a name without _ would be part of the config
_backbone.bottom_up.out_features = ["res3", "res4", "res5"]
# P6 and P7 from P5 (arXiv 2006.09214, section 2.2)
_backbone.top_block = L(LastLevelP6P7)(
    in_channels="${..out_channels}", out_channels="${..out_channels}", in_feature="p5"
)
model = L(FCOS)(
    backbone=_backbone,
    head=L(FCOSHead)(
        input_shape=[L(ShapeSpec)(channels="${....backbone.out_channels}")] * 5,
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256],
        prior_prob=0.01,
        norm="GN",
    ),
    num_classes=80,
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    focal_loss_alpha=0.25,
    focal_loss_gamma=2.0,
    test_score_thresh=0.2,
    test_nms_thresh=0.6,
    pixel_mean=_faster_rcnn.pixel_mean,
    pixel_std=_faster_rcnn.pixel_std,
)

dataloader.train.dataset.names = "coco_2017_train"
dataloader.train.mapper.augmentations[0].short_edge_length = (640, 672, 704, 736, 768, 800)
dataloader.test.dataset.names = "coco_2017_val"
dataloader.evaluator = L(COCOEvaluator)(dataset_name="${..test.dataset.names}")

optimizer.lr = 0.01
lr_multiplier.scheduler.milestones = [60000, 80000]
lr_multiplier.scheduler.num_updates = train.max_iter = 90000
lr_multiplier.warmup_length = 1000 / 90000
train.output_dir = "output/coco/fcos_R_50_FPN_lazy"

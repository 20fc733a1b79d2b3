# Mask R-CNN R-50-FPN from random weights with large-scale jitter (arXiv 2012.07177), 100 epochs of
# 64 images: Detectron2's new baseline with our backbone, as a LazyConfig.
#
#   python DETECTRON2/tools/lazyconfig_train_net.py \
#       --config-file configs/segmentation/coco/mask_rcnn_R_50_FPN_LSJ_lazy.py
#
# Needs: pip install shapely (Detectron2 crops masks with it).
# Debug: see ../../detection/voc/faster_rcnn_R_50_FPN_lazy.py, on which this stands.
# Expected: box AP 44.6, mask AP 40.3 (Detectron2 model zoo, 100 epochs); ours is not measured.
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead

from ...detection.voc.faster_rcnn_R_50_FPN_lazy import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

_SIZE = 1024


def _head_norm(channels):
    """Heads can have no regions, which torch's SyncBatchNorm does not take."""
    return NaiveSyncBatchNorm(channels, stats_mode="N")


model.backbone.bottom_up.update(norm="SyncBN", freeze_at=0)
model.backbone.norm = "SyncBN"
model.proposal_generator.head.conv_dims = [-1, -1]
_heads = model.roi_heads  # a name without _ would be part of the config
_heads.num_classes = 80
_heads.box_head.update(conv_dims=[256] * 4, fc_dims=[1024], conv_norm=_head_norm)
_heads.box_predictor.input_shape.channels = "${...box_head.fc_dims[0]}"
_heads.mask_in_features = ["p2", "p3", "p4", "p5"]
_heads.mask_pooler = L(ROIPooler)(
    output_size=14,
    scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
    sampling_ratio=0,
    pooler_type="ROIAlignV2",
)
_heads.mask_head = L(MaskRCNNConvUpsampleHead)(
    input_shape=L(ShapeSpec)(channels="${....backbone.out_channels}", width=14, height=14),
    num_classes="${..num_classes}",
    conv_dims=[256] * 5,
    conv_norm=_head_norm,
)

dataloader.train.dataset.names = "coco_2017_train"
dataloader.train.mapper.augmentations = [
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=_SIZE, target_width=_SIZE),
    L(T.FixedSizeCrop)(crop_size=(_SIZE, _SIZE)),
    L(T.RandomFlip)(horizontal=True),
]
dataloader.train.mapper.update(use_instance_mask=True, recompute_boxes=True)
dataloader.train.total_batch_size = 64
dataloader.test.dataset.names = "coco_2017_val"
dataloader.evaluator = L(COCOEvaluator)(dataset_name="${..test.dataset.names}")

optimizer.update(lr=0.1, weight_decay=4e-5)
train.update(init_checkpoint="", max_iter=184375)
train.output_dir = "output/coco/mask_rcnn_R_50_FPN_LSJ_lazy"
train.amp.enabled = train.ddp.fp16_compression = True
lr_multiplier.scheduler.milestones = [163889, 177546]
lr_multiplier.scheduler.num_updates = train.max_iter
lr_multiplier.update(warmup_length=500 / train.max_iter, warmup_factor=0.067)

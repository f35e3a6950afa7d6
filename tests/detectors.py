"""Configs of mmdet's detectors with narrow networks."""

BACKBONE = dict(type='mmdet.ResNet', depth=18, base_channels=4, out_indices=(1, 2, 3))
NECK = dict(type='mmdet.FPN', in_channels=[8, 16, 32], out_channels=8)
BOXES = dict(type='DeltaXYWHBBoxCoder')


def retinanet(backbone: dict = BACKBONE) -> dict:
    """A one-stage detector, whose raw outputs are scores and boxes."""
    return dict(
        type='RetinaNet',
        data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
        backbone=dict(backbone),
        neck=dict(NECK, num_outs=5),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=2,
            in_channels=8,
            feat_channels=8,
            anchor_generator=_anchors([8, 16, 32, 64, 128]),
            bbox_coder=BOXES,
        ),
        train_cfg=dict(
            assigner=_assigner(0.5, 0.4), sampler=dict(type='PseudoSampler'), pos_weight=-1
        ),
        test_cfg=dict(
            nms_pre=100,
            score_thr=0.05,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=10,
        ),
    )


def faster_rcnn(backbone: dict = BACKBONE) -> dict:
    """A two-stage detector, whose second stage takes an image's boxes in every mode."""
    proposals = dict(nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7))
    return dict(
        type='FasterRCNN',
        data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
        backbone=dict(backbone),
        neck=dict(NECK, num_outs=4),
        rpn_head=dict(
            type='RPNHead',
            in_channels=8,
            feat_channels=8,
            anchor_generator=_anchors([8, 16, 32, 64]),
            bbox_coder=BOXES,
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=0),
                out_channels=8,
                featmap_strides=[8, 16, 32],
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=8,
                fc_out_channels=8,
                roi_feat_size=3,
                num_classes=2,
                bbox_coder=BOXES,
            ),
        ),
        train_cfg=dict(
            rpn=dict(assigner=_assigner(0.7, 0.3), sampler=_sampler(), pos_weight=-1),
            rpn_proposal=proposals,
            rcnn=dict(assigner=_assigner(0.5, 0.5), sampler=_sampler(), pos_weight=-1),
        ),
        test_cfg=dict(
            rpn=proposals,
            rcnn=dict(
                score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10
            ),
        ),
    )


def _anchors(strides: list[int]) -> dict:
    return dict(
        type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0]
    ) | dict(strides=strides)


def _assigner(positive: float, negative: float) -> dict:
    return dict(
        type='MaxIoUAssigner', pos_iou_thr=positive, neg_iou_thr=negative, min_pos_iou=0.0
    )


def _sampler() -> dict:
    return dict(type='RandomSampler', num=16, pos_fraction=0.5)

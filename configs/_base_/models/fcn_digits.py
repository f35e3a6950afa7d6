# An FCN head on all four stages, upsampled to the size of the first. Configs that inherit
# this set the backbone and the head's in_channels.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        size=(64, 64),
        mean=[127.5] * 3,
        std=[127.5] * 3,
        pad_val=0,
        seg_pad_val=255,
    ),
    decode_head=dict(
        type='FCNHead',
        input_transform='resize_concat',
        in_index=[0, 1, 2, 3],
        channels=64,
        # A 3x3 conv on the concatenated stages would cost more than the backbone.
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(
            type='CrossEntropyLoss',
            # Six of seven pixels are background.
            class_weight=[0.6] + [3.0] * 10,
        ),
    ),
    test_cfg=dict(mode='whole'),
)

_base_ = '../repvgg/repvgg-tiny_1xb64_fashion-mnist.py'

model = dict(
    backbone=dict(
        block_cfg=dict(
            type='mmrep.BranchBlock',
            branches=['3x3', '1x1', '1x3', '3x1', 'avg', 'identity'],
        )
    ),
)

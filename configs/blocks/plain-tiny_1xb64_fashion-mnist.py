# The baseline of the blocks: one conv and one norm.
_base_ = '../repvgg/repvgg-tiny_1xb64_fashion-mnist.py'

model = dict(
    backbone=dict(block_cfg=None),
)

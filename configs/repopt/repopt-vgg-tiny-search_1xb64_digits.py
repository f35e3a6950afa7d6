_base_ = '../repvgg/repvgg-tiny_1xb64_digits.py'

model = dict(
    backbone=dict(type='mmrep.RepOptVGG', block_cfg=dict(type='mmrep.ScaleSumBlock'))
)

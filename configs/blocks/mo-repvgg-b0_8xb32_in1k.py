_base_ = 'mo-repvgg-a0_8xb32_in1k.py'

model = dict(backbone=dict(arch='B0'))

_base_ = 'orepa-repvgg-a0_8xb32_in1k.py'

model = dict(backbone=dict(arch='B2g2'), head=dict(in_channels=2560))

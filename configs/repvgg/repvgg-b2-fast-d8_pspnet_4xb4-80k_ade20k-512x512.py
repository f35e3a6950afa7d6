_base_ = 'repvgg-b2-d8_pspnet_4xb4-80k_ade20k-512x512.py'

# Only the last five layers are dilated: four of the third stage and the one of the last.
model = dict(backbone=dict(dilations=(1, 1, [1] * 12 + [2] * 4, 4)))

_base_ = 'repvgg-b2-d8_fcn_8xb2-40e_cityscapes-512x1024.py'

# Only the last five layers are dilated: four of the third stage and the one of the last.
model = dict(backbone=dict(dilations=(1, 1, [1] * 12 + [2] * 4, 4)))

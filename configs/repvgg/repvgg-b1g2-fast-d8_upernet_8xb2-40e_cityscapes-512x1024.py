_base_ = 'repvgg-b1g2_upernet_8xb2-40e_cityscapes-512x1024.py'

# Without dilation there would be nothing to be fast at: the output stride is 8, not 32,
# and only the last five layers are dilated, as with the other heads.
model = dict(backbone=dict(strides=(2, 2, 1, 1), dilations=(1, 1, [1] * 12 + [2] * 4, 4)))

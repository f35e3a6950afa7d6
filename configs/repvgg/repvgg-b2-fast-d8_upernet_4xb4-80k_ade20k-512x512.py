_base_ = 'repvgg-b2_upernet_4xb4-80k_ade20k-512x512.py'

# The UPerNet config has no dilation to reduce. So that this one matches the other heads,
# its output stride is 8, not 32, and only the last five layers are dilated.
model = dict(backbone=dict(strides=(2, 2, 1, 1), dilations=(1, 1, [1] * 12 + [2] * 4, 4)))

"""Which conv layers of mmcv convolve with their weight."""

from mmcv.cnn.bricks import Conv2d, Conv2dAdaptivePadding

from mmrep.reparam import register_linear_conv

# The wrapper differs from nn.Conv2d for empty inputs only.
register_linear_conv(Conv2d)
register_linear_conv(Conv2dAdaptivePadding, padding_mode='same')

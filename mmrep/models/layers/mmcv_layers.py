"""How the layers of mmcv are folded."""

from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import Conv2d, Conv2dAdaptivePadding
from mmcv.cnn.bricks.drop import DropPath
from mmcv.cnn.bricks.scale import LayerScale, Scale

from mmrep.reparam import (
    LinearConv,
    NotFoldableError,
    fold_identity,
    fold_layer,
    register_fold,
    register_linear_conv,
)

# The wrapper differs from nn.Conv2d for empty inputs only.
register_linear_conv(Conv2d)
register_linear_conv(Conv2dAdaptivePadding, padding_mode='same')
register_fold(DropPath, eval_only=True)(fold_identity)


@register_fold(Scale)
def _(layer: Scale, partial: LinearConv) -> LinearConv:
    return partial.then_scale(partial.cast(layer.scale).expand(partial.out_channels))


@register_fold(LayerScale)
def _(layer: LayerScale, partial: LinearConv) -> LinearConv:
    if layer.data_format != 'channels_first':
        raise NotFoldableError(
            f"LayerScale has data_format={layer.data_format!r}, not 'channels_first'"
        )
    return partial.then_scale(partial.cast(layer.weight))


@register_fold(ConvModule)
def _(module: ConvModule, partial: LinearConv) -> LinearConv:
    if module.with_activation:
        raise NotFoldableError('ConvModule has an activation')
    for part in module.order:
        if part == 'conv':
            if module.with_explicit_padding:
                partial = fold_layer(module.padding_layer, partial)
            partial = fold_layer(module.conv, partial)
        elif part == 'norm' and module.with_norm:
            partial = fold_layer(module.norm, partial)
    return partial

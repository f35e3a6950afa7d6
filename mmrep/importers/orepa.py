"""The layouts of OREPA's networks, https://github.com/JUGGHM/OREPA_CVPR2022.

ResNets and RepVGGs, whose convs have no groups. The scales of a block are the rows of one
matrix there. The kernels of a ResNet's 1x1 convs and stem are generated there as well; they
are imported as plain convs with these kernels.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.models.blocks import OREPABlock

from .dbb import RESNET_PLAIN, RESNET_UNITS
from .dbb_config import dbb_config
from .layout import Layout
from .renaming import every_leaf, under
from .repvgg import PLACES
from .repvgg_config import repvgg_config

_STEM = 'stage0.conv1'

#: The branch of each row of the scales; OREPA-RepVGG has no row for 1x1.
_ROWS = ('kxk', 'avg', 'prior', '1x1_kxk', '1x1', 'separable')
_REPVGG_ROWS = tuple(row for row in _ROWS if row != '1x1')

_WEIGHTS = {
    'origin': 'branch_kxk.conv',
    'avg_conv': 'branch_avg.conv',
    'pfir_conv': 'branch_prior.conv',
    '1x1_kxk_idconv1': 'branch_1x1_kxk.conv1',
    '1x1_kxk_conv2': 'branch_1x1_kxk.conv2',
    '1x1': 'branch_1x1.conv',
    'gconv_dw': 'branch_separable.depthwise',
    'gconv_pw': 'branch_separable.pointwise',
}
_CONSTANT = re.compile(r'.+\.(?:weight_\w+_(avg_avg|prior)|id_tensor)')
_LEFT_OUT = {
    _CONSTANT.pattern: 'constants of its blocks',
}


def _parts(prefix: str, rows: Iterable[str]) -> dict[str, str]:
    """New names of the tensors of a block's branches, after its scales are split."""
    weights = {f'weight_{prefix}_{old}': f'{new}.weight' for old, new in _WEIGHTS.items()}
    return weights | {f'scale_of_{row}': f'branch_{row}.scale.weight' for row in rows}


def _split_scales(
    weights: Mapping[str, Tensor], rows: tuple[str, ...], unused: int = 0
) -> dict[str, Tensor]:
    """Split each matrix of scales in the weights into a vector for each branch.

    A matrix may have ``unused`` more rows, which the authors' code does not use.
    """
    split = {}
    for key, value in weights.items():
        block, _, name = key.rpartition('.')
        if name != 'vector':
            split[key] = value
            continue
        if not len(rows) <= len(value) <= len(rows) + unused:
            raise ValueError(f'{key} has {len(value)} rows instead of {len(rows)}')
        for row, scale in zip(rows, value, strict=False):
            split[f'{block}.scale_of_{row}'] = scale
    return split


def _check_constants(weights: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` if a constant of these blocks has another value."""
    for key, value in weights.items():
        if not (found := _CONSTANT.fullmatch(key)):
            continue
        rows = len(value)
        if found[1] is None:
            # Only if square, so that this is no larger than the tensor in the file.
            square = value.numel() == rows**2
            expected = torch.eye(rows if square else 0)[:, :, None, None]
        elif found[1] == 'avg_avg':
            expected = torch.full_like(value, 1 / value.numel())
        else:
            block = _empty_block(1, rows, value.shape[1:])
            filters = block.branch_prior.filters
            expected = filters.kernel(value.dtype, value.device)[:, 0]
        same = value.shape == expected.shape
        if not (same and torch.allclose(value, expected.to(value), atol=1e-4)):
            raise ValueError(f'{key} is not the constant of these blocks without groups')


def _prepare_repvgg(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check the constants, and split the scales of an OREPA-RepVGG."""
    _check_constants(weights)
    # A block with an identity branch has an unused row for it.
    return _split_scales(weights, _REPVGG_ROWS, unused=1)


def _prepare_resnet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split scales, rename norms of blocks, and generate the other convs' kernels."""
    _check_constants(weights)
    blocks = {
        key.rpartition('.')[0] for key in weights if key.endswith('.weight_orepa_origin')
    }
    stem: dict[str, dict[str, Tensor]] = {f'{_STEM}.weight{i}': {} for i in range(3)}
    prepared = {}
    for key, value in weights.items():
        module, _, name = key.rpartition('.')
        if module in stem and not _CONSTANT.fullmatch(key):
            stem[module][name] = value
        elif f'{module}.weight_or1x1_origin' in weights:
            if name == 'vector':
                prepared[f'{module}.conv.weight'] = _pointwise_kernel(weights, module)
        elif module.endswith('.bn') and (block := module.removesuffix('.bn')) in blocks:
            prepared[f'{block}.post_norm.{name}'] = value
        else:
            prepared[key] = value
    if any(stem.values()):
        prepared[f'{_STEM}.conv.weight'] = _stem_kernel(list(stem.values()))
    return _split_scales(prepared, _ROWS)


def _pointwise_kernel(weights: Mapping[str, Tensor], unit: str) -> Tensor:
    """Generate the kernel of a 1x1 conv, ``v_0 W_0 + v_1 W_2 W_1``."""
    names = (*(f'weight_or1x1_{n}' for n in ('origin', 'l2i_conv1', 'l2i_conv2')), 'vector')
    own = [weights.get(f'{unit}.{name}') for name in names]
    if any(weight is None for weight in own):
        raise ValueError(f'{unit} lacks one of {", ".join(names)}')
    origin, first, second, scales = own
    outs, ins, inner = len(origin), origin.shape[1], len(first)
    expected = [(outs, ins, 1, 1), (inner, ins, 1, 1), (outs, inner, 1, 1), (2, outs)]
    if [tuple(weight.shape) for weight in own] != expected:
        raise ValueError(f'the weights of {unit} are not those of 1x1 convs')
    product = torch.einsum('tihw,othw->oihw', first, second)
    kept, added = scales[:, :, None, None, None]
    return kept * origin + added * product


@torch.no_grad()
def _stem_kernel(parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Generate the 7x7 kernel of the stem from its three 3x3 kernels."""
    first, *others = map(_generated_kernel, parts)
    kernel = first.transpose(0, 1)
    for other in others:
        # Each is correlated with the one before. Merging a conv after a conv would
        # convolve them instead, with the taps flipped.
        kernel = F.conv2d(kernel, other, padding=2)
    dtype = parts[0]['weight_orepa_origin'].dtype
    return kernel.transpose(0, 1).to(dtype).contiguous()


def _empty_block(ins: int, outs: int, size: Sequence[int]) -> OREPABlock:
    """A block on the meta device, since the file may declare a huge one."""
    with torch.device('meta'):
        return OREPABlock(ins, outs, tuple(size))


def _generated_kernel(weights: Mapping[str, Tensor]) -> Tensor:
    """The kernel of a block without a norm, in float64."""
    parts = _parts('orepa', _ROWS)
    split = _split_scales({f'stem.{key}': value for key, value in weights.items()}, _ROWS)
    tensors = {key.removeprefix('stem.'): value for key, value in split.items()}
    state = {parts[key]: value for key, value in tensors.items() if key in parts}
    outs, ins, *size = state['branch_kxk.conv.weight'].shape
    block = _empty_block(ins, outs, size)
    missing = block.load_state_dict(state, strict=False, assign=True).missing_keys
    if lost := [key for key in missing if key.startswith('branch_')]:
        raise ValueError(f'{", ".join(lost)} of the stem are missing')
    return block.double().sum_kernel()


_DEPLOYED = {
    **under(RESNET_UNITS, {r'orepa_reparam': 'branch_reparam'}),
    rf'{re.escape(_STEM)}\.or_large_reparam': 'backbone.conv1',
    r'stage([1-4])\.(\d+)\.conv([13])\.or1x1_reparam': r'backbone.layer\1.\2.conv\3',
    r'stage([1-4])\.(\d+)\.shortcut\.or1x1_reparam': r'backbone.layer\1.\2.downsample.0',
}

OREPA = Layout(
    name='orepa',
    mark=r'\.(weight_orepa_origin|orepa_reparam\.weight) ',
    rules={
        **under(RESNET_UNITS, _parts('orepa', _ROWS)),
        **every_leaf(
            {
                **under(RESNET_UNITS, {r'post_norm': 'post_norm'}),
                **RESNET_PLAIN,
                **_DEPLOYED,
                r'linear': 'head.fc',
            }
        ),
    },
    family=dbb_config,
    prepare=_prepare_resnet,
    options=dict(type='mmrep.ReparamResNet', block_cfg=dict(type='mmrep.OREPABlock')),
    left_out=_LEFT_OUT,
)

OREPA_REPVGG = Layout(
    name='orepa-repvgg',
    mark=r'\.rbr_dense\.weight_rbr_origin ',
    rules={
        **under(under(PLACES, {r'rbr_dense': 'branch_orepa'}), _parts('rbr', _REPVGG_ROWS)),
        **every_leaf(
            {
                **under(
                    PLACES,
                    {
                        r'rbr_dense\.bn': 'branch_orepa.post_norm',
                        r'rbr_1x1\.conv': 'branch_1x1.conv',
                        r'rbr_1x1\.bn': 'branch_1x1.norm',
                        r'rbr_identity': 'branch_norm',
                    },
                ),
                r'linear': 'head.fc',
            }
        ),
    },
    family=repvgg_config,
    prepare=_prepare_repvgg,
    options=dict(block_cfg=dict(type='mmrep.OREPARepVGGBlock')),
    left_out=_LEFT_OUT,
)

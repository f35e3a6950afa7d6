"""The layout of RepVGG for TensorFlow: a ``tf.keras.Model`` with the official names.

Its weights are read from Keras' ``.weights.h5``. Keras 3 names the layers of a model by
their class and number, and tf_keras, which is Keras 2, by their attribute. Both number
the variables of a layer.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmrep.errors import CheckpointError, reason

from .layout import Layout
from .renaming import under
from .repvgg_config import repvgg_config

_SIGNATURE = b'\x89HDF\r\n\x1a\n'

#: Limit on the bytes of all variables: this multiple of the file's, plus a constant.
_EXPANDED, _FILLED = 4, 1 << 24

#: Permutations of the axes of a matrix and of a kernel to torch's order.
_ORDERS = {2: (1, 0), 4: (3, 2, 0, 1)}

_CONV = ('weight',)
_LINEAR = ('weight', 'bias')
_NORM = ('weight', 'bias', 'running_mean', 'running_var')


def _variables(layers: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, str]:
    """Expand rules for layers to rules for their numbered variables."""
    return {
        f'{layer}/vars/{i}': f'{new}.{leaf}'
        for layer, (new, leaves) in layers.items()
        for i, leaf in enumerate(leaves)
    }


_PARTS = _variables(
    {
        'rbr_dense/conv': ('branch_3x3.conv', _CONV),
        'rbr_dense/bn': ('branch_3x3.norm', _NORM),
        'rbr_1x1/conv': ('branch_1x1.conv', _CONV),
        'rbr_1x1/bn': ('branch_1x1.norm', _NORM),
        'rbr_identity': ('branch_norm', _NORM),
        'rbr_reparam': ('branch_reparam', _LINEAR),
    }
)
_PLACES = {'(?:layers/rep_vgg_block|stage0)': 'backbone.stem'}
for _i, _layer in enumerate(('sequential', *(f'sequential_{n}' for n in (1, 2, 3))), 1):
    # The first of several layers of a class has no number.
    _block = f'(?:layers/{_layer}|stage{_i})/layers/rep_vgg_block'
    _PLACES[_block] = f'backbone.stage_{_i}.0'
    _PLACES[rf'{_block}_(\d+)'] = rf'backbone.stage_{_i}.\1'

KERAS = Layout(
    name='keras',
    mark=r'/rbr_\w+/(\w+/)?vars/\d ',
    rules={
        **under(_PLACES, _PARTS, '/'),
        **_variables({'(?:layers/)?dense': ('head.fc', _LINEAR)}),
    },
    family=repvgg_config,
    options=dict(
        # Keras' defaults; its momentum of 0.99 is torch's of 0.01.
        norm_cfg=dict(type='BN', eps=1e-3, momentum=0.01),
        conv_cfg=dict(type='Conv2dAdaptivePadding'),
    ),
    left_out={r'optimizer/.+': 'state of the optimizer'},
    deploy_note='the TensorFlow code fuses a 1x1 kernel into the middle of the 3x3 one, '
    "which under 'SAME' padding with stride 2 is right for odd input sizes only; if you "
    'have the train form, import that and fuse it with tools/reparam.py',
)


def is_hdf5(path: str | Path) -> bool:
    """Whether a file is HDF5, the format of Keras' weights."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, 'rb') as file:
            return file.read(len(_SIGNATURE)) == _SIGNATURE
    except OSError:
        # The reader will report why it cannot be read.
        return False


def read_keras(path: str | Path) -> dict[str, Tensor]:
    """Read the variables of a ``.weights.h5`` by path, with axes in torch's order.

    Convolution kernels are HWIO there and OIHW here, matrices are transposed.

    Raises:
        CheckpointError: If h5py is missing, or the file cannot be read or declares much
            more data than its size.
    """
    try:
        import h5py
    except ImportError:
        raise CheckpointError(
            f"{path} is an HDF5 file, which h5py reads: pip install 'mmrep[keras]'"
        ) from None
    variables = {}
    # Keras does not compress, and compressed weights do not exceed this.
    left = _EXPANDED * os.path.getsize(path) + _FILLED

    def add(name: str, item: object) -> None:
        nonlocal left
        if isinstance(item, h5py.Dataset):
            left -= max(item.nbytes, math.prod(item.chunks or ()) * item.dtype.itemsize)
            if left < 0:
                raise CheckpointError(
                    f'{path} declares much more data than its size ({name} has the shape '
                    f'{item.shape}): save the weights again, without compression'
                )
            if item.external or item.is_virtual:
                raise CheckpointError(
                    f'{path} has {name} in another file: save all weights in one file'
                )
            if item.dtype.kind not in 'biuf':
                raise CheckpointError(
                    f'{path} holds {name}, which is not an array of numbers: save the '
                    'weights again, without it'
                )
            # h5py returns scalars, such as counters, as numbers.
            variable = torch.from_numpy(np.asarray(item[()]))
            order = _ORDERS.get(variable.ndim, tuple(range(variable.ndim)))
            variables[name] = variable.permute(order).contiguous()

    try:
        with h5py.File(path, 'r') as file:
            file.visititems(add)
    except CheckpointError:
        raise
    except Exception as error:
        # h5py raises a dozen types for a damaged file.
        raise CheckpointError(
            f'{path} cannot be read as weights of Keras ({reason(error)}): '
            "save them again with model.save_weights('NAME.weights.h5')"
        ) from error
    return variables

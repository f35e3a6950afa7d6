"""RepVGG for TensorFlow: what it computes, in torch, and the files that Keras writes.

The structure and the names are those of the port whose weights mmrep imports.
"""

from pathlib import Path

import torch.nn.functional as F
from official_repvgg import RepVGG
from torch import Tensor, nn

ARCH = dict(
    num_blocks=(2, 3, 2, 1), widths=(16, 16, 32, 128), groups={2: 2, 4: 4}, num_classes=7
)


class SameConv(nn.Conv2d):
    """A conv with TensorFlow's 'SAME' padding: the odd pixel goes below and right."""

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size, k, s in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            total = max(((size - 1) // s) * s + k - size, 0)
            sides += [total // 2, total - total // 2]
        x = F.pad(x, sides)
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


def build(deploy: bool = False) -> RepVGG:
    """The network, with Keras' epsilon."""
    model = RepVGG(**ARCH, conv=SameConv, deploy=deploy)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return model


def places(keras_3: bool) -> dict[str, str]:
    """The groups of the layers in a file, by their names in torch."""
    names = {}
    names['stage0'] = 'layers/rep_vgg_block' if keras_3 else 'stage0'
    names['linear'] = 'dense' if keras_3 else 'layers/dense'
    for i, count in enumerate(ARCH['num_blocks']):
        number = f'_{i}' if i else ''
        stage = f'layers/sequential{number}' if keras_3 else f'stage{i + 1}'
        for j in range(count):
            number = f'_{j}' if j else ''
            names[f'stage{i + 1}.{j}'] = f'{stage}/layers/rep_vgg_block{number}'
    return names


def variables(model: RepVGG, keras_3: bool) -> dict[str, Tensor]:
    """The variables of the network by their paths in a file, with Keras' axes."""
    leaves = ('weight', 'bias', 'running_mean', 'running_var')
    found = {}
    for place, group in places(keras_3).items():
        for name, layer in model.get_submodule(place).named_modules():
            path = '/'.join([group, *filter(None, name.split('.')), 'vars'])
            owned = [getattr(layer, leaf, None) for leaf in leaves]
            for i, value in enumerate(v for v in owned if isinstance(v, Tensor)):
                axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.dim(), range(value.dim()))
                found[f'{path}/{i}'] = value.detach().permute(*axes)
    return found


def write(path: Path, values: dict[str, Tensor]) -> Path:
    """Write variables as Keras does."""
    import h5py

    with h5py.File(path, 'w') as file:
        for name, value in values.items():
            file.create_dataset(name, data=value.numpy())
        # Layers without variables have a group as well.
        file.create_group('gap/vars').attrs['name'] = 'global_average_pooling2d'
    return path

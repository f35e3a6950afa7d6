import re

import pytest
import torch
from import_laws import assert_imports, features_of, import_weights
from laws import assert_same, image, on_meta, randomise
from mmpretrain.models.backbones import RepLKNet
from torch import Tensor, nn

from mmrep.benchmark import peak_memory
from mmrep.errors import CheckpointError
from mmrep.importers.replknet import REPLKNET
from mmrep.importers.replknet_config import replknet_config
from mmrep.models import backbones

FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
TINY = dict(
    large_kernel_sizes=(9, 7, 5, 3),
    layers=(1, 2, 1, 1),
    channels=(4, 8, 8, 12),
    small_kernel=3,
    dw_ratio=1.5,
)


class Classifier(nn.Module):
    """mmpretrain's network, and a linear layer after the mean."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.backbone = RepLKNet(TINY, **options)
        self.head = nn.ModuleDict(dict(fc=nn.Linear(TINY['channels'][-1], 10)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head['fc'](self.backbone(x)[-1].mean((2, 3)))

    def official(self) -> dict[str, Tensor]:
        """The weights by the names of the authors' code."""
        return {
            key.removeprefix('backbone.')
            .replace('stages.3.norm.', 'norm.')
            .replace('head.fc.', 'head.'): value
            for key, value in self.state_dict().items()
        }


def x():
    return image(2, 3, 64, 64, dtype=torch.float32)


@FORMS
@pytest.mark.parametrize('layout', ['replknet', 'mmpretrain-replknet'])
def test_classifier(layout, deploy, tmp_path):
    model = randomise(Classifier(small_kernel_merged=deploy)).eval()
    official = layout == 'replknet'
    state = model.official() if official else model.state_dict()
    weights = dict(model=state) if official else dict(state_dict=state)
    done = assert_imports(model, weights, x(), tmp_path, layout)
    arch = TINY | (dict(small_kernel=None) if deploy else {})
    form = dict(deploy=True) if deploy else {}
    expected = dict(type='mmrep.RepLKNet', arch=arch, out_indices=(3,), **form)
    assert done.backbone == expected
    assert done.used == len(state) and not done.left_out


@FORMS
def test_features(deploy, tmp_path):
    options = dict(out_indices=(1, 2, 3), ffn_ratio=2, in_channels=5)
    model = randomise(RepLKNet(TINY, small_kernel_merged=deploy, **options))
    # It returns nothing.
    model.eval()
    done = import_weights(model.state_dict(), tmp_path)
    assert done.layout == 'replknet' and done.head is None
    assert {name: done.backbone[name] for name in options} == options
    images = image(2, 5, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        assert_same(model(images), features_of(done.out, images))


@pytest.mark.parametrize(
    'key',
    [
        'stages.999999999.blocks.0.pw2.conv.weight',
        'stages.1.blocks.999999999.pw2.conv.weight',
        'stages.0.blocks.40000.large_kernel.lkb_origin.conv.weight',
    ],
)
def test_numbers_in_keys_build_no_network(key, tmp_path):
    state = RepLKNet(TINY).state_dict()
    state[key] = torch.zeros(1, 1, 1, 1)
    with pytest.raises(CheckpointError, match=r"the main conv of mmrep's block .* missing"):
        import_weights(state, tmp_path)


def test_widths_of_a_small_file_take_no_memory(tmp_path):
    state = RepLKNet(TINY).state_dict()
    state['stages.0.blocks.0.pw2.conv.weight'] = torch.zeros(30000, 1, 1, 1)

    def refused() -> None:
        with pytest.raises(CheckpointError, match='give a whole and unchanged checkpoint'):
            import_weights(state, tmp_path)

    assert peak_memory(refused) < 50 * 2**20


def test_outputs_without_norms_are_refused(tmp_path):
    state = RepLKNet(TINY).state_dict()
    state = {k: v for k, v in state.items() if not re.match(r'stages\.\d\.norm', k)}
    with pytest.raises(CheckpointError, match='no stage has the norm of an output'):
        import_weights(state, tmp_path)


@FORMS
@pytest.mark.parametrize('name', backbones.RepLKNet.arch_settings)
def test_named_architectures_are_recognised(name, deploy):
    state = on_meta(backbones.RepLKNet, name, deploy=deploy).state_dict()
    expected = dict(type='mmrep.RepLKNet', arch=name, out_indices=(3,))
    assert replknet_config(state, REPLKNET) == expected

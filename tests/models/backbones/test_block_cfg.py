"""A body does not know its blocks: every block in the place of the body's own."""

import pytest
from laws import assert_deploy_equivalent, image

from mmrep.models.backbones import DBBVGG, ReparamResNet, RepVGG
from mmrep.reparam import count_parameters

BODIES = {
    'RepVGG': lambda **options: RepVGG(
        dict(num_blocks=(1, 2, 1, 1), width_factor=(0.0625,) * 4), **options
    ),
    'ResNet-18': lambda **options: ReparamResNet(
        18, base_channels=4, stem_channels=4, **options
    ),
    'VGG-11': lambda **options: DBBVGG(11, base_channels=4, **options),
}
BLOCKS = {
    'RepVGGBlock': {},
    'AsymmetricConvBlock': {},
    'BranchBlock': dict(branches=('kxk', '3x1', 'avg', 'identity')),
    'LargeKernelBlock': dict(small_kernel=1),
    'MobileOneBlock': dict(num_convs=2),
    'OREPABlock': {},
    'OREPARepVGGBlock': {},
    'QARepVGGBlock': dict(average=True),
    'ScaleSumBlock': dict(scale=0.5),
}


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('body', BODIES)
def test_deploys_to_the_same_plain_network(body, name):
    block_cfg = dict(type=f'mmrep.{name}', **BLOCKS[name])
    network = BODIES[body](block_cfg=block_cfg).double()
    deployed = assert_deploy_equivalent(network, image(1, 3, 32, 32))
    plain = BODIES[body](block_cfg=dict(type='mmrep.ConvNormBlock'), deploy=True)
    assert count_parameters(deployed) == count_parameters(plain)

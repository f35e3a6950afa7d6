import os

import pytest
import torch
from laws import assert_same, image, randomise
from mmengine.config import Config
from tiny_projects import classifier_model
from torch import nn

from mmrep.deployment import (
    VerificationError,
    build_model,
    expand_checkpoint,
    read_config,
)
from mmrep.errors import CheckpointError, ConfigError, UserError
from mmrep.expansion import expand
from mmrep.hosts import forward
from mmrep.models.blocks import DiverseBranchBlock, ReparamBlock, RepVGGBlock
from mmrep.reparam import branch_by_branch

RESNET = dict(type='ResNet', depth=18, base_channels=4, stem_channels=4)
SHAPE = (3, 32, 32)
X = image(1, *SHAPE, dtype=torch.float32)


class Plain:
    """A config of a host's model, and its weights."""

    def __init__(self, folder) -> None:
        self.path, self.checkpoint = folder / 'plain.py', folder / 'plain.pth'
        model = classifier_model(RESNET, 32)
        Config(dict(default_scope='mmpretrain', model=model)).dump(self.path)
        self.config = read_config(self.path)
        self.model = randomise(build_model(self.config)).eval()
        self.save(self.model.state_dict())

    def save(self, state_dict: dict) -> None:
        meta = dict(epoch=7, dataset_meta=dict(classes=('a', 'b')))
        torch.save(dict(state_dict=state_dict, meta=meta), self.checkpoint)

    def expand(self, out=None, block='DBB', weights=True, shape=SHAPE, **options):
        checkpoint = self.checkpoint if weights else None
        return expand_checkpoint(
            self.config, self.path, block, checkpoint, out, shape, **options
        )


@pytest.fixture
def plain(tmp_path) -> Plain:
    return Plain(tmp_path)


def blocks_of(model: nn.Module) -> dict[str, ReparamBlock]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ReparamBlock)}


class TestFiles:
    def test_the_same_function(self, plain, tmp_path):
        done = plain.expand(tmp_path / 'deeper' / 'new.py')
        assert (done.out, done.out_checkpoint) == (
            tmp_path / 'deeper/new.py',
            tmp_path / 'deeper/new.pth',
        )
        assert done.out.read_text().startswith("_base_ = '../plain.py'\n")
        config = read_config(done.out)
        model = build_model(config)
        read = torch.load(done.out_checkpoint, weights_only=True)
        assert read['meta'] == dict(epoch=7, dataset_meta=dict(classes=('a', 'b')))
        model.load_state_dict(read['state_dict'], strict=True)
        assert done.expansion.replaced.keys() == blocks_of(model).keys()
        assert len(blocks_of(model)) == 16
        with torch.no_grad(), branch_by_branch(model):
            assert_same(forward(plain.model, X), forward(model, X), 1e-6)
        assert done.params_before == sum(p.numel() for p in plain.model.parameters())
        assert done.params_after == sum(p.numel() for p in model.parameters())
        # The rest of the config is the host's.
        expected = plain.config.to_dict()
        expected['model'].update(type='mmrep.Expanded', expand=config.model.expand)
        assert config.to_dict() == expected

    def test_choice(self, plain, tmp_path):
        done = plain.expand(
            tmp_path / 'new.py',
            'RepVGG',
            include=['backbone.layer[12].*'],
            exclude=['*.conv2'],
            kernel_sizes=[3],
        )
        assert sorted(done.expansion.replaced) == [
            f'backbone.layer{stage}.{unit}.conv1' for stage in (1, 2) for unit in (0, 1)
        ]
        blocks = blocks_of(build_model(read_config(done.out)))
        assert blocks.keys() == done.expansion.replaced.keys()
        assert {type(block) for block in blocks.values()} == {RepVGGBlock}

    def test_block_by_its_type(self, plain, tmp_path):
        done = plain.expand(tmp_path / 'new.py', 'mmrep.DiverseBranchBlock', weights=False)
        assert done.out_checkpoint is None
        assert sorted(os.listdir(tmp_path)) == ['new.py', 'plain.pth', 'plain.py']
        blocks = blocks_of(build_model(read_config(done.out)))
        assert {type(block) for block in blocks.values()} == {DiverseBranchBlock}

    def test_size_of_the_config(self, plain, tmp_path):
        done = plain.expand(tmp_path / 'new.py', shape=None)
        assert done.shape == (1, 3, 224, 224)
        assert 'shape' not in read_config(done.out).model.expand

    @pytest.mark.parametrize('kind', ['ImageClassifier', "'ImageClassifier'"])
    def test_a_config_with_imports(self, tmp_path, kind):
        """No other inherits from one: it is written whole."""
        (tmp_path / 'base.py').write_text(
            'from mmpretrain.models import ImageClassifier\n'
            "default_scope = 'mmpretrain'\n"
            f'model = dict(type={kind}, backbone={RESNET})\n'
        )
        path = tmp_path / 'plain.py'
        path.write_text(
            'from mmengine.config import read_base\n'
            'with read_base():\n    from .base import *\n'
            'seen = 7\n'
        )
        done = expand_checkpoint(
            read_config(path), path, 'DBB', out=tmp_path / 'new.py', shape=SHAPE
        )
        config = read_config(done.out)
        assert len(blocks_of(build_model(config))) == 16
        assert config.seen == 7 and config.model.backbone == RESNET
        assert config.model.expand.of.endswith('ImageClassifier')

    def test_dry_run(self, plain, tmp_path):
        done = plain.expand()
        assert len(done.expansion.replaced) == 16
        assert done.expansion.left['backbone.conv1'] == '7x7'
        assert done.out is done.out_checkpoint is done.params_after is None
        assert sorted(os.listdir(tmp_path)) == ['plain.pth', 'plain.py']

    def test_overwrite(self, plain, tmp_path):
        (tmp_path / 'new.pth').write_text('mine')
        with pytest.raises(UserError, match=r'new\.pth exists'):
            plain.expand(tmp_path / 'new.py')
        assert plain.expand(tmp_path / 'new.py', overwrite=True).out_checkpoint


class TestWrongInput:
    @pytest.mark.parametrize(
        'options, error, message',
        [
            (dict(block='Foo'), UserError, "cannot be expanded: 'Foo' is not a re-param"),
            (dict(block='BN'), UserError, "cannot be expanded: 'BN' is not a re-param"),
            (dict(include=['neck*']), UserError, r"expanded: 'neck\*' matches no conv"),
            (dict(exclude=['a']), UserError, "expanded: 'a' matches no conv"),
            (dict(kernel_sizes=[9]), UserError, 'expanded: no conv can be replaced'),
            (dict(shape=(4, 32, 32)), UserError, r'plain form cannot process .* --shape'),
            (dict(out='plain.py', overwrite=True), UserError, 'would replace .*plain'),
            (dict(out='new.txt'), UserError, r'must end in \.py'),
        ],
    )
    def test_is_refused(self, plain, tmp_path, monkeypatch, options, error, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error, match=message):
            plain.expand(**{'out': 'new.py', **options})
        assert sorted(os.listdir(tmp_path)) == ['plain.pth', 'plain.py']

    def test_weights_of_another_model(self, plain, tmp_path):
        plain.save({'a': torch.ones(1)})
        with pytest.raises(CheckpointError):
            plain.expand(tmp_path / 'new.py')

    def test_an_expanded_config(self, plain, tmp_path):
        done = plain.expand(tmp_path / 'new.py')
        with pytest.raises(ConfigError, match='has blocks in the place of convs already'):
            expand_checkpoint(read_config(done.out), done.out, 'DBB')

    def test_another_function(self, plain, tmp_path, monkeypatch):
        def wrong(model, *args, **kwargs):
            expansion = expand(model, *args, **kwargs)
            with torch.no_grad():
                model.backbone.layer1[0].conv1.main_conv.weight.mul_(1.01)
            return expansion

        monkeypatch.setattr('mmrep.deployment.expanding.expand', wrong)
        with pytest.raises(VerificationError, match='from the plain model'):
            plain.expand(tmp_path / 'new.py')
        assert sorted(os.listdir(tmp_path)) == ['plain.pth', 'plain.py']

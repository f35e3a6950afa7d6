"""Detectors of mmdet: fused, verified and exported by their raw outputs or features."""

import pytest
import torch
from detectors import BACKBONE, faster_rcnn, retinanet
from laws import assert_same, image, randomise
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn

from mmrep.deployment import build_model, deploy_checkpoint, enter_scope, export_onnx
from mmrep.hosts import forward
from mmrep.reparam import branch_by_branch, flatten_outputs

pytest.importorskip('mmdet')

DBB = dict(type='mmrep.DiverseBranchBlock')
EXPANDED = {**BACKBONE, 'type': 'mmrep.Expanded', 'expand': dict(of='ResNet', block=DBB)}
#: A backbone of ours, whose stages are as wide.
REPVGG = dict(
    type='mmrep.RepVGG',
    arch=dict(num_blocks=(1, 1, 1, 1), width_factor=(0.0625, 0.0625, 0.0625, 0.0625)),
    out_indices=(1, 2, 3),
)
DETECTORS = {'RetinaNet': retinanet, 'Faster R-CNN': faster_rcnn}
#: Names of the outputs that are compared, besides the features of the backbone.
OUTPUTS = {
    'RetinaNet': [f'output[{part}][{level}]' for part in range(2) for level in range(5)],
    'Faster R-CNN': [f'output[{level}]' for level in range(4)],
}
SHAPE = (3, 64, 96)
X = image(1, *SHAPE, dtype=torch.float32)
every_detector = pytest.mark.parametrize('name', DETECTORS)


def config_of(name: str, backbone: dict) -> Config:
    config = Config(dict(default_scope='mmdet', model=DETECTORS[name](backbone)))
    enter_scope(config)
    return config


@every_detector
class TestDetector:
    def test_forward(self, name):
        model = build_model(config_of(name, BACKBONE))
        assert list(flatten_outputs(forward(model, X))) == OUTPUTS[name]
        # Without what is known of the images alone.
        features = flatten_outputs(model.extract_feat(X))
        same = name == 'Faster R-CNN'
        assert (list(flatten_outputs(forward(model, X))) == list(features)) is same

    @pytest.mark.parametrize('backbone', ['expanded', 'of ours'])
    def test_deploy_files(self, tmp_path, name, backbone):
        expanded = backbone == 'expanded'
        config = config_of(name, EXPANDED if expanded else REPVGG)
        model = randomise(build_model(config)).eval()
        torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
        done = deploy_checkpoint(config, tmp_path / 'a.pth', tmp_path / 'b.pth', SHAPE)
        compared = [n for n in done.verification.outputs if not n.startswith('backbone')]
        assert compared == OUTPUTS[name]
        assert done.verification.blocks.keys() == set(done.report.switched)
        fused = Config.fromfile(done.out_config)
        read = torch.load(done.out, weights_only=True)['state_dict']
        with MODELS.switch_scope_and_registry('mmdet') as models:
            deployed = models.build(fused.model).eval()
        assert ('mmrep' in fused.pretty_text) is not expanded
        deployed.load_state_dict(read, strict=True)
        with torch.no_grad(), branch_by_branch(model):
            assert_same(forward(model, X), forward(deployed, X), 1e-5)

    def test_onnx(self, tmp_path, name):
        pytest.importorskip('onnxruntime')
        config = config_of(name, EXPANDED)
        model = randomise(build_model(config))
        torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
        done = export_onnx(config, tmp_path / 'a.pth', tmp_path / 'a.onnx', shape=SHAPE)
        assert done.out.exists()


def test_a_transformer_shows_its_features():
    """It takes annotations, though it has a default for them."""

    class Transformer(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def extract_feat(self, x):
            return (self.conv(x),)

        def forward_transformer(self, *args):
            raise AssertionError

        def _forward(self, inputs, data_samples=None):
            return self.forward_transformer(inputs, data_samples)

        def forward(self, inputs, data_samples=None, mode='tensor'):
            return self._forward(inputs, data_samples)

    model = Transformer()
    assert_same(forward(model, X), (model.conv(X),), 0)

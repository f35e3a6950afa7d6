import hashlib
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import assert_same, image, randomise
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

import mmrep
from mmrep.checkpoints import read_checkpoint
from mmrep.deployment import (
    OnnxExport,
    VerificationError,
    build_model,
    deploy_checkpoint,
    enter_scope,
    export,
    export_onnx,
    onnx_tracing,
)
from mmrep.errors import CheckpointError, UserError
from mmrep.hosts import forward
from mmrep.models.layers import DilatedAvgPool2d, IdentityConv1x1
from mmrep.reparam import branch_by_branch, has_running_statistics

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

ARCH = dict(num_blocks=(1, 2, 2, 1), width_factor=(0.125, 0.125, 0.0625, 0.0625))
REPVGG = dict(type='mmrep.RepVGG', arch=ARCH, strides=(1, 2, 2, 2))
#: Blocks, and those of them with an identity branch.
BLOCKS, IDENTITIES = 7, 3
DBB = dict(
    type='mmrep.DBBResNetV1d',
    depth=18,
    base_channels=4,
    stem_channels=8,
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(0, 1),
)
SAME = dict(REPVGG, conv_cfg=dict(type='Conv2dAdaptivePadding'))
SHAPE = (3, 48, 32)


class Network(BaseModel):
    """A model of mmengine: a backbone and what a test makes of its last map."""

    def __init__(self, backbone: dict = REPVGG) -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'loss') -> Any:
        assert mode == 'tensor'
        return self.head(self.backbone(inputs)[-1])


@pytest.fixture(autouse=True, scope='module')
def networks() -> Iterator[None]:
    """Heads that are hard to export, in mmengine's registry."""

    class PyramidNetwork(Network):
        """Pools to 1, 2, 3 and 2 x 5 bins, and resizes to the map's size."""

        def head(self, x: Tensor) -> dict[str, Tensor]:
            pooled = [F.adaptive_avg_pool2d(x, bins) for bins in (1, 2, 3, (2, 5))]
            size = x.shape[2:]
            sized = [F.interpolate(y, size, mode='bilinear') for y in pooled]
            return dict(seg=torch.cat([x, *sized], 1), scores=x.mean((2, 3)))

    class FlattenNetwork(Network):
        """Takes one size only."""

        def head(self, x: Tensor) -> Tensor:
            return F.linear(x.flatten(1), x.new_ones(2, 32 * 3 * 2))

    class NormNetwork(Network):
        """Has a norm outside its blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(32, 4, 1), nn.BatchNorm2d(4)

        def head(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    class MeanNetwork(Network):
        """Computes a number from the input in Python."""

        def head(self, x: Tensor) -> Tensor:
            return x * (2 + x.mean().item())

    class HeightNetwork(Network):
        """Decides by the height in Python."""

        def head(self, x: Tensor) -> Tensor:
            return x + 1 if x.size(2) > 3 else x

    class SortNetwork(Network):
        """Has an operator that ONNX lacks."""

        def head(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(x)

    class SilentNetwork(Network):
        """Returns no tensor."""

        def head(self, x: Tensor) -> None:
            return None

    made = [
        Network,
        PyramidNetwork,
        FlattenNetwork,
        NormNetwork,
        MeanNetwork,
        HeightNetwork,
        SortNetwork,
        SilentNetwork,
    ]
    for network in made:
        MODELS.register_module(module=network)
    yield
    for network in made:
        del MODELS._module_dict[network.__name__]


class Project:
    """A config, a checkpoint with random weights, and where the graph goes."""

    def __init__(self, folder: Path, model: dict, draw: bool = True) -> None:
        self.config = Config(dict(model=model))
        enter_scope(self.config)
        self.folder = folder
        self.checkpoint, self.out = folder / 'epoch_3.pth', folder / 'net.onnx'
        self.model = build_model(self.config)
        if draw:
            randomise(self.model)
        torch.save(dict(state_dict=self.model.state_dict()), self.checkpoint)

    def export(self, **options: Any) -> OnnxExport:
        options = dict(dict(shape=SHAPE), **options)
        return export_onnx(self.config, self.checkpoint, self.out, **options)

    def operators(self) -> dict[str, int]:
        """Those of the file."""
        return dict(Counter(n.op_type for n in onnx.load(self.out).graph.node))

    def computed(self, x: Tensor) -> list[Tensor]:
        """The outputs of the file."""
        session = onnxruntime.InferenceSession(self.out)
        return [torch.from_numpy(y) for y in session.run(None, {'input': x.numpy()})]

    def expected(self, x: Tensor) -> Any:
        """The outputs of the checkpoint's model."""
        with branch_by_branch(self.model):
            return forward(self.model, x)

    def refuse(self, *says: str, error: type = UserError, **options: Any) -> None:
        """The export must end with one sentence, and write nothing."""
        before = sorted(os.listdir(self.folder))
        with pytest.raises(error) as info:
            self.export(**options)
        message = str(info.value)
        assert '\n' not in message and len(message) < 1000
        for part in says:
            assert part in message
        assert sorted(os.listdir(self.folder)) == before


#: The exporters of the installed torch.
EXPORTERS = onnx_tracing.exporters(None)


@pytest.fixture(params=['torch.export', 'TorchScript'])
def exporter(request, monkeypatch) -> str:
    """Each exporter alone, without the fallback."""
    if request.param not in EXPORTERS:
        pytest.skip(f'torch {torch.__version__} has no {request.param} for ONNX')
    monkeypatch.setattr(export, 'exporters', lambda opset: [request.param])
    return request.param


def count(model: nn.Module, *kinds: type) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


@pytest.mark.usefixtures('exporter')
class TestOperators:
    # Equal tensors are where an exporter shares them, by operators of their own.
    @pytest.mark.parametrize('draw', [True, False], ids=['random', 'initial'])
    @pytest.mark.parametrize('dynamic', [False, True])
    def test_deployed_repvgg_is_convs_and_relus(self, tmp_path, draw, dynamic):
        project = Project(tmp_path, REPVGG, draw)
        done = project.export(dynamic=dynamic)
        assert done.operators == {'Conv': BLOCKS, 'Relu': BLOCKS}
        assert project.operators() == done.operators
        assert (done.blocks, done.out) == (BLOCKS, project.out)
        assert done.size == project.out.stat().st_size

    @pytest.mark.parametrize('draw', [True, False], ids=['random', 'initial'])
    def test_repvgg_has_its_branches(self, tmp_path, draw):
        project = Project(tmp_path, REPVGG, draw)
        done = project.export(form='train')
        assert (
            project.operators()
            == done.operators
            == {
                'Conv': 2 * BLOCKS,
                'BatchNormalization': 2 * BLOCKS + IDENTITIES,
                'Add': BLOCKS + IDENTITIES,
                'Relu': BLOCKS,
            }
        )
        assert done.blocks == BLOCKS

    def test_dbb_has_its_branches(self, tmp_path):
        project = Project(tmp_path, DBB)
        project.export(form='train')
        found = project.operators()
        norms = sum(has_running_statistics(m) for m in project.model.modules())
        assert found.pop('BatchNormalization') == norms
        assert found.pop('Conv') == count(project.model, nn.Conv2d, IdentityConv1x1)
        pools = count(project.model, nn.AvgPool2d, DilatedAvgPool2d)
        assert found.pop('AveragePool') == pools
        # Of the padding between two layers, and nothing that computes weights.
        assert found.keys() == {'Relu', 'MaxPool', 'Add', 'Sub'}

    def test_deployed_dbb(self, tmp_path):
        project = Project(tmp_path, DBB)
        project.export()
        found = project.operators()
        # Of the stem, the two stages and their shortcuts.
        assert found.pop('Conv') == 3 + 8 + 2
        assert found.keys() == {'Relu', 'MaxPool', 'Add', 'AveragePool'}

    def test_norms_outside_the_blocks_are_folded_in_the_deploy_form(self, tmp_path):
        project = Project(tmp_path, dict(type='NormNetwork'))
        project.export()
        assert project.operators() == {'Conv': BLOCKS + 1, 'Relu': BLOCKS}
        project.export(form='train', overwrite=True)
        norms = 2 * BLOCKS + IDENTITIES + 1
        assert project.operators()['BatchNormalization'] == norms

    def test_fixed_sizes_are_no_operators(self, tmp_path, exporter):
        project = Project(tmp_path, dict(type='PyramidNetwork'))
        project.export()
        fixed = project.operators()
        project.export(dynamic=True, overwrite=True)
        assert 'Shape' in project.operators()
        # Which torch.export writes for the mean over a map.
        pool = {'GlobalAveragePool'} if exporter == 'TorchScript' else set()
        assert fixed.keys() - pool == {
            *('Conv', 'Relu', 'MatMul', 'Resize', 'Concat', 'ReduceMean')
        }

    def test_what_has_no_blocks_is_exported_as_it_is(self, tmp_path):
        plain = dict(type='mmrep.ReparamResNet', depth=18, base_channels=4)
        project = Project(tmp_path, plain)
        done = project.export(form='train')
        assert done.blocks == 0
        convs = count(project.model, nn.Conv2d)
        assert done.operators['BatchNormalization'] == done.operators['Conv'] == convs


class TestOutputs:
    @pytest.mark.usefixtures('exporter')
    @pytest.mark.parametrize('form', ['train', 'deploy'])
    @pytest.mark.parametrize('dynamic', [False, True])
    @pytest.mark.parametrize(
        'model',
        [DBB, dict(type='PyramidNetwork', backbone=dict(REPVGG, out_indices=(1,)))],
        ids=['DBB-ResNet', 'pyramid'],
    )
    def test_onnx_runtime_agrees(self, tmp_path, model, form, dynamic):
        project = Project(tmp_path, model)
        project.export(form=form, dynamic=dynamic)
        for shape in [(2, 3, 37, 90), (1, 3, 64, 64)] if dynamic else [(1, *SHAPE)]:
            x = image(*shape, dtype=torch.float32, seed=7)
            expected = project.expected(x)
            expected = expected.values() if isinstance(expected, dict) else expected
            assert_same(list(expected), project.computed(x), tolerance=1e-5)

    @pytest.mark.parametrize('form', ['train', 'deploy'])
    @pytest.mark.parametrize('shape', [(3, 48, 33), (3, 49, 32)])
    def test_padding_by_size_is_that_of_the_size(self, tmp_path, form, shape):
        project = Project(tmp_path, SAME)
        project.export(form=form, shape=shape)
        x = image(1, *shape, dtype=torch.float32, seed=7)
        assert_same(list(project.expected(x)), project.computed(x), tolerance=1e-5)
        assert project.operators().keys() <= {
            *('Pad', 'Conv', 'Relu', 'BatchNormalization', 'Add')
        }

    def test_what_is_compared(self, tmp_path):
        project = Project(tmp_path, dict(type='PyramidNetwork'))
        (shapes, differences) = zip(*project.export().comparisons, strict=True)
        assert shapes == ((1, 3, 48, 32),) * 3
        # Of different images.
        assert len({d['output_seg'].rel_l2 for d in differences}) == 3
        for found in differences:
            assert found.keys() == {'output_seg', 'output_scores'}
            assert all(0 < d.rel_l2 < 1e-5 for d in found.values())
        done = project.export(dynamic=True, overwrite=True)
        shapes = [shape for shape, _ in done.comparisons]
        assert shapes == [(2, 3, 48, 32), (1, 3, 80, 96), (3, 3, 81, 33)]

    def test_names_and_sizes(self, tmp_path):
        project = Project(tmp_path, dict(type='PyramidNetwork'))
        project.export(dynamic=True)

        def sizes(values) -> dict[str, list]:
            return {
                v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
                for v in values
            }

        graph = onnx.load(project.out).graph
        assert sizes(graph.input) == {'input': ['batch', 3, 'height', 'width']}
        channels = 4 * 5 * 8
        assert sizes(graph.output) == {
            'output_seg': ['batch', channels, 'output_seg_2', 'output_seg_3'],
            'output_scores': ['batch', channels // 5],
        }
        project.export(overwrite=True)
        graph = onnx.load(project.out).graph
        assert sizes(graph.input) == {'input': [1, 3, 48, 32]}
        assert sizes(graph.output)['output_scores'] == [1, channels // 5]

    @pytest.mark.parametrize('bins', [2, 3, (2, 5), (None, 3), (7, None), (9, 1)])
    @pytest.mark.parametrize('size', [(8, 8), (7, 12), (3, 2)])
    def test_adaptive_average(self, bins, size):
        x = image(2, 3, *size)
        assert_same(F.adaptive_avg_pool2d(x, bins), onnx_tracing.adaptive_average(x, bins))

    def test_only_maps_are_resized(self):
        """A head may return scores beside its logits."""
        x, scores = image(2, 3, 8, 6), image(2, 5)
        outputs = dict(seg=image(2, 4, 4, 3), scores=scores)
        found = onnx_tracing.resized(outputs, x, align_corners=False)
        assert found['seg'].shape == (2, 4, 8, 6) and found['scores'] is scores


class TestExporters:
    @pytest.fixture(autouse=True)
    def needs_two(self) -> None:
        if len(EXPORTERS) < 2:
            pytest.skip(f'torch {torch.__version__} has one exporter only')

    def test_the_supported_one_is_the_first(self, tmp_path):
        project = Project(tmp_path, REPVGG)
        result = project.export()
        assert (result.exporter, result.remarks) == ('torch.export', [])
        (opset,) = onnx.load(project.out).opset_import
        assert opset.version == 18

    def test_old_opsets_are_for_the_deprecated_one(self, tmp_path):
        project = Project(tmp_path, REPVGG)
        result = project.export(opset=17)
        assert (result.exporter, result.remarks) == ('TorchScript', [])
        (opset,) = onnx.load(project.out).opset_import
        assert opset.version == 17

    def test_new_opsets_are_for_the_supported_one(self, tmp_path):
        project = Project(tmp_path, REPVGG)
        assert project.export(opset=21).exporter == 'torch.export'
        (opset,) = onnx.load(project.out).opset_import
        assert opset.version == 21

    @pytest.mark.parametrize(
        ('fails', 'error'),
        [('trace', onnx_tracing.ExportError), ('verify', VerificationError)],
    )
    def test_one_stands_in_for_the_other(self, tmp_path, monkeypatch, fails, error):
        """And the remark has the reason, without what to do about it."""
        calls = []
        original = getattr(export, fails)

        def fail_once(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 1:
                raise error('it is Monday: nothing was written; wait')
            return original(*args)

        monkeypatch.setattr(export, fails, fail_once)
        project = Project(tmp_path, REPVGG)
        result = project.export()
        assert result.exporter == 'TorchScript'
        says = 'written by TorchScript, because torch.export failed: it is Monday'
        assert result.remarks == [says]
        assert project.operators() == {'Conv': BLOCKS, 'Relu': BLOCKS}

    def test_the_reason_is_the_model_s(self, tmp_path, monkeypatch):
        """torch.export begins with advice to its developers."""

        def fail(network: Network, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                raise ValueError('no graphs today')
            return x

        monkeypatch.setattr(Network, 'head', fail, raising=False)
        result = Project(tmp_path, dict(type='Network')).export()
        assert 'ValueError: no graphs today' in result.remarks[0]

    def test_a_decision_by_the_values(self, tmp_path, monkeypatch, capfd):
        """torch.export cannot write one, and would log and print a page about it."""
        logged = []
        logger = logging.getLogger('torch.fx.experimental.symbolic_shapes')
        monkeypatch.setattr(logger, 'callHandlers', logged.append)
        decide = lambda _, x: x if x.square().sum() > 0 else -x  # noqa: E731
        monkeypatch.setattr(Network, 'head', decide, raising=False)
        result = Project(tmp_path, dict(type='Network')).export()
        assert result.exporter == 'TorchScript'
        assert 'data-dependent' in result.remarks[0]
        assert capfd.readouterr() == ('', '') and not logged

    def test_other_errors_are_not_tried_again(self, tmp_path, monkeypatch):
        calls = []

        def fail(*args: Any) -> None:
            calls.append(args)
            raise UserError('the disk is full')

        monkeypatch.setattr(export, 'verify', fail)
        Project(tmp_path, REPVGG).refuse('the disk is full')
        assert len(calls) == 1

    def test_what_onnxscript_raises(self, tmp_path, monkeypatch):
        """It is a failure of the exporter, too."""

        def fail(exported: Any) -> None:
            raise KeyError('folding')

        monkeypatch.setattr(onnx_tracing, 'fold_constants', fail)
        Project(tmp_path, REPVGG).refuse('KeyError', 'another --opset')

    @pytest.mark.parametrize('form', ['train', 'deploy'])
    def test_nodes_are_named_alike(self, tmp_path, monkeypatch, form):
        """By their modules, and without the paths of the machine."""
        found = []
        for name in EXPORTERS:
            monkeypatch.setattr(export, 'exporters', lambda opset, name=name: [name])
            project = Project(tmp_path, dict(type='Network', backbone=DBB))
            monkeypatch.setattr(Network, 'head', lambda _, x: x, raising=False)
            project.export(form=form, overwrite=True)
            graph = onnx.load(project.out).graph
            names = [node.name for node in graph.node]
            assert len(set(names)) == len(names)
            found.append({name for name in names if '/Conv' in name})
            assert not any(node.doc_string for node in graph.node)
            holders = [graph, *graph.node, *graph.input, *graph.output, *graph.value_info]
            assert not any(holder.metadata_props for holder in holders)
            assert __file__.encode() not in project.out.read_bytes()
        assert found[0] == found[1]
        path = 'backbone.layer1.0.conv1'
        branch = f'{path}.branch_kxk.conv' if form == 'train' else f'{path}.branch_reparam'
        assert f'{branch}/Conv' in found[0]


class TestForms:
    @pytest.fixture
    def deployed(self, tmp_path) -> Project:
        """A project whose checkpoint is in deploy form, and its deploy config."""
        project = Project(tmp_path, REPVGG)
        done = deploy_checkpoint(
            project.config, project.checkpoint, tmp_path / 'd.pth', SHAPE
        )
        project.checkpoint = done.out
        project.deploy_config = Config.fromfile(done.out_config)
        return project

    @pytest.mark.parametrize('config', ['config', 'deploy_config'])
    def test_a_deploy_checkpoint_goes_with_either_config(self, deployed, config):
        deployed.config = getattr(deployed, config)
        assert deployed.export().operators == {'Conv': BLOCKS, 'Relu': BLOCKS}
        x = image(1, *SHAPE, dtype=torch.float32, seed=7)
        assert_same(list(deployed.expected(x)), deployed.computed(x), tolerance=1e-5)

    def test_a_deploy_checkpoint_has_no_branches(self, deployed):
        deployed.refuse('--form deploy', error=CheckpointError, form='train')

    def test_a_train_checkpoint_does_not_fit_a_deploy_config(self, deployed, tmp_path):
        deployed.config = deployed.deploy_config
        deployed.checkpoint = tmp_path / 'epoch_3.pth'
        deployed.refuse('does not fit the config', error=CheckpointError)

    def test_what_cannot_be_fused_is_exported_in_train_form(self, tmp_path):
        norm_cfg = dict(type='GN', num_groups=2)
        project = Project(tmp_path, dict(REPVGG, norm_cfg=norm_cfg))
        project.refuse('stem.branch_3x3', 'GroupNorm', '--form train')
        assert 'InstanceNormalization' in project.export(form='train').operators

    def test_record(self, tmp_path):
        preprocessor = dict(mean=[127.5], std=[60.0])
        project = Project(tmp_path, REPVGG)
        project.config.data_preprocessor = preprocessor
        project.export(source_config='configs/net.py')
        (entry,) = onnx.load(project.out).metadata_props
        assert entry.key == 'mmrep'
        assert json.loads(entry.value) == dict(
            version=mmrep.__version__,
            form='deploy',
            source='epoch_3.pth',
            source_sha256=hashlib.sha256(project.checkpoint.read_bytes()).hexdigest(),
            source_config='net.py',
            data_preprocessor=preprocessor,
        )


class TestRefusals:
    def test_padding_by_size_cannot_be_dynamic(self, tmp_path):
        project = Project(tmp_path, SAME)
        project.refuse("stem.branch_3x3.conv pads by the size of its input ('SAME')",
                       'without --dynamic', dynamic=True)  # fmt: skip

    def test_a_number_from_the_input(self, tmp_path, exporter):
        """TorchScript keeps that of the input it traces; others tell."""
        project = Project(tmp_path, dict(type='MeanNetwork'))
        if exporter == 'TorchScript':
            project.refuse('relative L2', '(1, 3, 48, 32)', error=VerificationError)
        else:
            assert project.export().exporter == exporter

    def test_a_decision_by_size(self, tmp_path):
        """The graph keeps the one for the size it was traced with."""
        project = Project(tmp_path, dict(type='HeightNetwork'))
        shape = (3, 40, 32)
        assert project.export(shape=shape).operators == {'Conv': BLOCKS, 'Relu': BLOCKS}
        before = project.out.read_bytes()
        project.refuse(
            'relative L2',
            '(1, 3, 72, 96)',
            'leave --dynamic out',
            error=VerificationError,
            shape=shape,
            dynamic=True,
            overwrite=True,
        )
        assert project.out.read_bytes() == before

    def test_one_size_only(self, tmp_path):
        project = Project(tmp_path, dict(type='FlattenNetwork'))
        project.refuse('no other size than 48x32', '--dynamic', dynamic=True)
        operators = project.export().operators
        assert operators.get('MatMul', 0) + operators.get('Gemm', 0) == 1
        project.refuse('(1, 3, 64, 64)', '--shape', shape=(3, 64, 64), overwrite=True)

    def test_an_operator_that_onnx_lacks(self, tmp_path, capfd):
        project = Project(tmp_path, dict(type='SortNetwork'))
        project.refuse(f'torch {torch.__version__}', 'opset 17', 'svd')
        # The exporter would print the graph.
        assert len(''.join(capfd.readouterr())) < 1000

    @pytest.mark.parametrize('opset', [3, 99])
    def test_an_opset_that_is_none(self, tmp_path, opset):
        Project(tmp_path, REPVGG).refuse(f'opset {opset}', 'another --opset', opset=opset)

    def test_a_graph_that_onnx_runtime_cannot_load(self, tmp_path, monkeypatch):
        fold = onnx_tracing.fold_constants

        def spoil(exported) -> None:
            fold(exported)
            exported.graph.node[0].op_type = 'Unheard'

        monkeypatch.setattr(onnx_tracing, 'fold_constants', spoil)
        project = Project(tmp_path, REPVGG)
        project.refuse('cannot load', 'Unheard', error=VerificationError)

    def test_more_than_rtol(self, tmp_path):
        project = Project(tmp_path, REPVGG)
        project.refuse('more than 1e-12', error=VerificationError, rtol=1e-12)
        project.refuse('a number between 0 and 1', rtol=float('nan'))

    @pytest.mark.parametrize(
        ('scale', 'says'), [(0, 'is zero everywhere'), (float('nan'), 'is not finite')]
    )
    def test_outputs_that_prove_nothing(self, tmp_path, monkeypatch, scale, says):
        monkeypatch.setattr(Network, 'head', lambda self, x: scale * x, raising=False)
        project = Project(tmp_path, dict(type='Network'))
        project.refuse(f'output of the train form {says}', error=VerificationError)

    @pytest.mark.parametrize('dynamic', [False, True])
    def test_outputs_that_do_not_depend_on_the_input(self, tmp_path, monkeypatch, dynamic):
        monkeypatch.setattr(Network, 'head', lambda _, x: 0 * x + 1, raising=False)
        project = Project(tmp_path, dict(type='Network'))
        project.refuse(
            'no output depends on the input', error=VerificationError, dynamic=dynamic
        )
        monkeypatch.setattr(Network, 'head', lambda _, x: 1e-4 * x + 1)
        (remark,) = project.export(dynamic=dynamic).remarks
        assert re.match(r'output hardly depends on the input \(\d', remark)
        monkeypatch.setattr(Network, 'head', lambda _, x: x)
        assert project.export(dynamic=dynamic, overwrite=True).remarks == []

    def test_a_block_that_is_fused_wrong(self, tmp_path, monkeypatch):
        """By less than the outputs would tell."""
        fuse = export.fuse

        def spoil(model: nn.Module, remedy: str) -> None:
            fuse(model, remedy)
            with torch.no_grad():
                model.stage_1[0].branch_reparam.weight *= 1 + 5e-5

        monkeypatch.setattr(export, 'fuse', spoil)
        says = 'stage_1.0 differs by 5e-05 (relative L2) from its branches'
        Project(tmp_path, REPVGG).refuse(says, error=VerificationError)

    def test_no_output(self, tmp_path):
        Project(tmp_path, dict(type='SilentNetwork')).refuse('returns no tensor')

    def test_too_large(self, tmp_path, monkeypatch):
        project = Project(tmp_path, REPVGG)
        weights = sum(
            t.numel() * t.element_size()
            for t in read_checkpoint(project.checkpoint)['state_dict'].values()
        )
        monkeypatch.setattr(onnx_tracing, '_MAX_WEIGHTS', weights - 1)
        project.refuse(f'{weights:,} bytes', '2 GiB', form='train')
        # What counts is what is written.
        project.export()

    @pytest.mark.parametrize('package', ['onnx', 'onnxruntime', 'onnxscript'])
    def test_packages_that_are_missing(self, tmp_path, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        Project(tmp_path, REPVGG).refuse(package, "pip install 'mmrep[onnx]'")

    def test_a_file_that_is_there(self, tmp_path):
        project = Project(tmp_path, REPVGG)
        project.out.write_text('old')
        project.refuse('net.onnx exists', '--overwrite')
        assert project.out.read_text() == 'old'
        project.export(overwrite=True)
        assert project.operators() == {'Conv': BLOCKS, 'Relu': BLOCKS}

    def test_another_ending(self, tmp_path):
        project = Project(tmp_path, REPVGG)
        project.out = tmp_path / 'net.pth'
        project.refuse('must end in .onnx')

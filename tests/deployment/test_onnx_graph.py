import pytest

pytest.importorskip('onnx')

from onnx import ModelProto, NodeProto, StringStringEntryProto, TensorProto
from onnx.helper import make_graph, make_model, make_node, make_tensor_value_info

from mmrep.deployment.onnx_graph import name_nodes


def scoped(*scopes: str, op: str = 'Relu', inputs: tuple[str, ...] = ('x',)) -> NodeProto:
    """A node as ``torch.export`` writes it."""
    node = make_node(op, inputs, ['y'], name='node_1', doc_string='net.py, line 3')
    key = 'pkg.torch.onnx.name_scopes'
    node.metadata_props.append(StringStringEntryProto(key=key, value=str(list(scopes))))
    return node


def named(*nodes: NodeProto, weights: tuple[str, ...] = ()) -> list[str]:
    x, y = (make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in 'xy')
    graph = make_graph(nodes, 'graph', [x], [y])
    for name in weights:
        graph.initializer.add(name=name, data_type=TensorProto.FLOAT)
    model: ModelProto = make_model(graph)
    name_nodes(model)
    for node in model.graph.node:
        assert not node.doc_string and not node.metadata_props
    return [node.name for node in model.graph.node]


@pytest.mark.parametrize(
    ('scope', 'name'),
    [
        (
            '/model/backbone/stem/branch_reparam/Conv',
            'backbone.stem.branch_reparam/Conv',
        ),
        ('/model/backbone/stage_1/stage_1.0/conv/Conv', 'backbone.stage_1.0.conv/Conv'),
        ('/model/head/fc/Conv_1', 'head.fc/Conv'),
        ('/conv_seg/Conv', 'conv_seg/Conv'),
        ('/model/neck/lateral_convs.1/conv/Conv', 'neck.lateral_convs.1.conv/Conv'),
        ('/model/Conv', 'Conv'),
        ('', 'Conv'),
    ],
)
def test_names_of_torchscript(scope, name):
    assert named(make_node('Conv', ['x', 'w'], ['y'], name=scope)) == [name]


@pytest.mark.parametrize(
    ('scopes', 'name'),
    [
        (
            ('', 'model', 'model.backbone', 'model.backbone.0.act', 'relu'),
            'backbone.0.act/',
        ),
        (('', 'model', 'model.models', 'relu'), 'models/'),
        (('', 'model', 'add'), ''),
        (('_empty_nn_module_stack_from_metadata_hook', 'sym_size_int_32'), ''),
        (('relu',), ''),
    ],
)
def test_names_of_torch_export(scopes, name):
    assert named(scoped(*scopes)) == [f'{name}Relu']


def test_a_layer_is_called_as_its_weight():
    """And not as the norm that was folded into it."""
    scopes, inputs = (
        ('', 'model', 'model.0', 'model.0.bn', 'norm'),
        ('x', 'model.0.conv.weight'),
    )
    node = scoped(*scopes, op='Conv', inputs=inputs)
    assert named(node, weights=inputs[1:]) == ['0.conv/Conv']
    assert named(node) == ['0.bn/Conv']


def test_names_are_unique():
    nodes = [scoped('', 'model', 'model.act', 'relu') for _ in range(3)]
    assert named(*nodes) == ['act/Relu', 'act/Relu_2', 'act/Relu_3']


def test_a_shared_tensor_names_no_layer():
    """TorchScript keeps one of equal tensors, by the name of the first module."""
    nodes = [
        scoped('', 'model', f'model.{i}', 'norm', op='Mul', inputs=('x', 'model.0.weight'))
        for i in range(2)
    ]
    assert named(*nodes, weights=('model.0.weight',)) == ['0/Mul', '1/Mul']

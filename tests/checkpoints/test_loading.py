import copy

import pytest
import torch
from laws import assert_same, assert_same_step, image, randomise, step
from tiny_runner import TinyModel
from torch import nn

from mmrep.checkpoints import is_deploy_form, load_strictly, state_dict_of
from mmrep.errors import CheckpointError
from mmrep.reparam import switch_to_deploy


def network() -> nn.Sequential:
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


@pytest.fixture
def state() -> dict:
    return network().state_dict()


def prefixed(state: dict, prefix: str) -> dict:
    return {f'{prefix}{key}': value for key, value in state.items()}


class TestStateDictOf:
    @pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model'])
    @pytest.mark.parametrize('prefix', ['', 'module.'])
    def test_wrappers(self, state, wrapper, prefix):
        checkpoint = prefixed(state, prefix)
        if wrapper:
            checkpoint = {wrapper: checkpoint, 'meta': {'epoch': 1}}
        assert_same(state, state_dict_of(checkpoint, 'a.pth'))
        assert list(state_dict_of(checkpoint, 'a.pth')) == list(state)

    def test_state_dict_comes_before_model(self, state):
        assert state_dict_of({'model': {'no': 1}, 'state_dict': state}, 'a.pth') == state

    def test_module_of_that_name_keeps_it(self, state):
        checkpoint = {**prefixed(state, 'module.'), 'fc.weight': torch.ones(1)}
        assert state_dict_of(checkpoint, 'a.pth') == checkpoint

    @pytest.mark.parametrize(
        'checkpoint',
        [
            {},
            {'state_dict': {}},
            {'state_dict': {'a': 1}},
            {'a': torch.ones(1), 'b': [1]},
            {1: torch.ones(1)},
            [torch.ones(1)],
            torch.ones(1),
            None,
        ],
        ids=str,
    )
    def test_nothing_of_the_kind(self, checkpoint):
        with pytest.raises(CheckpointError, match=r'a\.pth holds no state dict'):
            state_dict_of(checkpoint, 'a.pth')


class TestLoadStrictly:
    def test_weights_are_loaded(self, state):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        load_strictly(model, state, 'a.pth')
        assert_same(state, model.state_dict())

    def test_wrapped_model(self, state):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        load_strictly(nn.DataParallel(model), state, 'a.pth')
        assert_same(state, model.state_dict())

    def test_counter_may_be_missing(self, state):
        del state['1.num_batches_tracked']
        load_strictly(network(), state, 'a.pth')

    def test_other_keys_are_listed_and_nothing_is_loaded(self, state):
        model = network()
        before = copy.deepcopy(model.state_dict())
        state = {key: value + 1 for key, value in state.items()}
        del state['0.bias'], state['1.running_var']
        state['2.weight'] = torch.ones(1)
        state['1.bias'] = torch.ones(5)
        with pytest.raises(CheckpointError) as info:
            load_strictly(model, state, 'a.pth')
        assert str(info.value) == (
            'a.pth does not fit the config: give the config that it was trained with ('
            '2 missing: 0.bias, 1.running_var; 1 unexpected: 2.weight; '
            '1 of another shape: 1.bias ((5,) in the file, (4,) in the model))'
        )
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key])

    @pytest.mark.parametrize(
        ('change', 'kind'),
        [
            (lambda state: state.pop('0.weight'), '1 missing'),
            (lambda state: state.update(more=torch.ones(1)), '1 unexpected'),
            (
                lambda state: state.update({'0.bias': torch.ones(4, 1)}),
                '1 of another shape',
            ),
        ],
        ids=['missing', 'unexpected', 'shape'],
    )
    def test_one_key_is_enough(self, state, change, kind):
        change(state)
        with pytest.raises(CheckpointError, match=kind):
            load_strictly(network(), state, 'a.pth')

    def test_long_lists_are_shortened(self, state):
        state.update({f'x{i}': torch.ones(1) for i in range(20)})
        with pytest.raises(CheckpointError, match=r'20 unexpected: .*x7, and 12 more\)'):
            load_strictly(network(), state, 'a.pth')

    def test_short_lists_are_whole(self, state):
        state.update({f'x{i}': torch.ones(1) for i in range(8)})
        with pytest.raises(CheckpointError, match=r'x0, .*x7\)'):
            load_strictly(network(), state, 'a.pth')

    def test_forms(self):
        train, deploy = TinyModel(), TinyModel()
        switch_to_deploy(deploy)
        assert is_deploy_form(deploy.state_dict())
        assert not is_deploy_form(train.state_dict())
        with pytest.raises(CheckpointError, match='it is in deploy form and the config'):
            load_strictly(train, deploy.state_dict(), 'a.pth')
        with pytest.raises(CheckpointError, match='it is in train form and the config'):
            load_strictly(deploy, train.state_dict(), 'a.pth')
        with pytest.raises(CheckpointError, match='config: give the config'):
            load_strictly(train, network().state_dict(), 'a.pth')


class TestNumbers:
    """Of another dtype than the model's."""

    @pytest.mark.parametrize('assign', [True, False], ids=['assigned', 'copied'])
    @pytest.mark.parametrize(
        ('key', 'value'),
        [
            ('0.bias', torch.tensor([1, -2, 3, 4])),
            ('0.bias', torch.tensor([True, False, True, True])),
            ('0.bias', torch.tensor([1.5, -2, 3, 4]).to(torch.float8_e4m3fn)),
            ('0.bias', torch.tensor([1.1, -2, 3, 4], dtype=torch.float64)),
            ('0.bias', torch.tensor([1.1, -2, 3, 4], dtype=torch.bfloat16)),
            ('1.num_batches_tracked', torch.tensor(7.0)),
            ('1.num_batches_tracked', torch.tensor(7, dtype=torch.int32)),
        ],
        ids=lambda value: str(getattr(value, 'dtype', value)),
    )
    def test_same_values(self, state, key, value, assign):
        model = network()
        own = model.state_dict()[key].dtype
        load_strictly(model, {**state, key: value}, 'a.pth', assign=assign)
        loaded = model.state_dict()[key]
        assert loaded.dtype == own
        assert torch.equal(loaded, value.double().to(own))

    @pytest.mark.parametrize('assign', [True, False], ids=['assigned', 'copied'])
    @pytest.mark.parametrize(
        ('key', 'value'),
        [
            ('0.bias', torch.ones(4, dtype=torch.complex64)),
            ('0.bias', torch.tensor([1, 2, 3, 2**24 + 1])),
            ('1.num_batches_tracked', torch.tensor(7.5)),
            ('1.num_batches_tracked', torch.tensor(float('nan'))),
            ('1.num_batches_tracked', torch.tensor(7 + 1j)),
        ],
        ids=lambda value: str(getattr(value, 'dtype', value)),
    )
    def test_other_values(self, state, key, value, assign):
        model = network()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError) as info:
            load_strictly(model, {**state, key: value}, 'a.pth', assign=assign)
        assert f'1 of incompatible dtype: {key} ({value.dtype} in the' in str(info.value)
        assert_same(before, model.state_dict(), tolerance=0)

    def test_complex_model(self):
        model = nn.Conv2d(1, 1, 1, dtype=torch.complex64)
        weights = randomise(nn.Conv2d(1, 1, 1, dtype=torch.complex64)).state_dict()
        load_strictly(model, weights, 'a.pth')
        assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)


class TestAssign:
    """Of the tensors themselves."""

    def test_the_tensors_are_taken(self, state):
        model = network()
        load_strictly(model, state, 'a.pth', assign=True)
        for key, tensor in model.state_dict().items():
            assert tensor.data_ptr() == state[key].data_ptr(), key

    def test_they_are_copied_otherwise(self, state):
        model = network()
        load_strictly(model, state, 'a.pth')
        for key, tensor in model.state_dict().items():
            assert tensor.data_ptr() != state[key].data_ptr(), key

    def test_other_dtypes_are_cast(self, state):
        model = network()
        given = {key: tensor.double() for key, tensor in state.items()}
        load_strictly(model, given, 'a.pth', assign=True)
        for key, tensor in model.state_dict().items():
            assert tensor.dtype == state[key].dtype, key
        assert_same(state, model.state_dict(), tolerance=0)

    @pytest.mark.parametrize('requires_grad', [True, False])
    def test_requires_grad_is_the_models(self, state, requires_grad):
        model = network().requires_grad_(requires_grad)
        state['0.weight'] = state['0.weight'].clone().requires_grad_()
        load_strictly(model, state, 'a.pth', assign=True)
        parameters = list(model.parameters())
        assert len(parameters) == 4
        assert all(type(p) is nn.Parameter and p.is_leaf for p in parameters)
        assert {p.requires_grad for p in parameters} == {requires_grad}

    def test_counter_may_be_missing(self, state):
        model = network()
        counter = state.pop('1.num_batches_tracked')
        load_strictly(model, state, 'a.pth', assign=True)
        assert torch.equal(model[1].num_batches_tracked, counter)
        assert model[1].num_batches_tracked.dtype == torch.int64

    def test_the_model_can_be_trained(self, state):
        model, twin = network(), network()
        for loaded, assign in ((model, True), (twin, False)):
            load_strictly(loaded, copy.deepcopy(state), 'a.pth', assign=assign)
        x = image(2, 3, 4, 4, dtype=torch.float32)
        assert_same_step(step(twin, x), step(model, x))

    def test_wrapped_model(self, state):
        model = network()
        load_strictly(nn.DataParallel(model), state, 'a.pth', assign=True)
        assert model[0].weight.data_ptr() == state['0.weight'].data_ptr()

    def test_nothing_is_taken_where_one_key_is_wrong(self, state):
        model = network()
        before = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
        del state['1.bias']
        with pytest.raises(CheckpointError, match=r'1 missing: 1\.bias'):
            load_strictly(model, state, 'a.pth', assign=True)
        after = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
        assert before == after


class TestOwnHooks:
    """What a model does with a state dict before it loads it."""

    @pytest.mark.parametrize('assign', [True, False])
    def test_keys_that_they_know(self, state, assign):
        model = nn.Sequential(network())

        def rename(state_dict, prefix, *args):
            if f'{prefix}0.old' in state_dict:
                state_dict[f'{prefix}0.weight'] = state_dict.pop(f'{prefix}0.old')

        model[0]._register_load_state_dict_pre_hook(rename)
        given = prefixed(state, '0.')
        given['0.0.old'] = given.pop('0.0.weight')
        keys = list(given)
        load_strictly(model, given, 'a.pth', assign=assign)
        assert_same(state, model[0].state_dict())
        assert list(given) == keys

    def test_one_that_raises(self, state):
        model = network()

        def fail(state_dict, *args):
            raise KeyError('other')

        model[0]._register_load_state_dict_pre_hook(fail)
        with pytest.raises(
            CheckpointError, match=r"a\.pth does not fit .*KeyError: 'other'"
        ):
            load_strictly(model, state, 'a.pth')

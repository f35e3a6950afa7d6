"""RepVGG for TensorFlow.

Keras is optional: without it, the files are written in its layout, and the test with it
compares that layout with what it writes.
"""

import sys

import keras_repvgg
import numpy as np
import pytest
import torch
from import_laws import backbone_of, logits_of
from laws import assert_differ, assert_same, image, randomise

from mmrep.errors import CheckpointError
from mmrep.importers import import_checkpoint
from mmrep.importers.keras import read_keras
from mmrep.reparam import switch_to_deploy

FOUND = dict(
    type='mmrep.RepVGG',
    arch=dict(
        num_blocks=(2, 3, 2, 1),
        width_factor=(0.25, 0.125, 0.125, 0.25),
        group_layer_map={2: 2, 4: 4},
    ),
    out_indices=(3,),
    norm_cfg=dict(type='BN', eps=1e-3, momentum=0.01),
    conv_cfg=dict(type='Conv2dAdaptivePadding'),
)
FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
VERSIONS = pytest.mark.parametrize('keras_3', [False, True], ids=['keras2', 'keras3'])


def pictures(size):
    return image(2, 3, size, size, dtype=torch.float32)


def import_file(path, **options):
    return import_checkpoint(path, path.parent / 'imported.pth', **options)


@FORMS
@VERSIONS
def test_keras(keras_3, deploy, tmp_path):
    model = randomise(keras_repvgg.build(deploy)).eval()
    values = keras_repvgg.variables(model, keras_3)
    values['optimizer/vars/0'] = torch.tensor(1)
    done = import_file(keras_repvgg.write(tmp_path / 'a.weights.h5', values))
    assert done.layout == 'keras'
    assert done.backbone == {**FOUND, **(dict(deploy=True) if deploy else {})}
    assert done.used == len(values) - 1
    assert done.left_out == {'state of the optimizer': 1}
    assert bool(done.note) == deploy
    # Even and odd sizes are padded differently.
    for size in (64, 63, 48):
        with torch.no_grad():
            expected = model(pictures(size))
        assert_same(expected, logits_of(done.out, pictures(size)))


def test_the_paddings_matter(tmp_path):
    """The test above would see a wrong padding or epsilon."""
    model = randomise(keras_repvgg.build()).eval()
    values = keras_repvgg.variables(model, True)
    done = import_file(keras_repvgg.write(tmp_path / 'a.weights.h5', values))
    x = pictures(64)
    right = backbone_of(done.out)
    for name in ('conv_cfg', 'norm_cfg'):
        config = {key: value for key, value in done.backbone.items() if key != name}
        wrong = type(right)(**{k: v for k, v in config.items() if k != 'type'}).eval()
        wrong.load_state_dict(right.state_dict())
        with torch.no_grad():
            assert_differ(right(x)[0], wrong(x)[0])


def test_an_imported_train_form_can_be_fused(tmp_path):
    model = randomise(keras_repvgg.build()).eval()
    values = keras_repvgg.variables(model, True)
    backbone = backbone_of(
        import_file(keras_repvgg.write(tmp_path / 'a.weights.h5', values)).out
    )
    with torch.no_grad():
        expected = backbone(pictures(64))
        switch_to_deploy(backbone)
        assert_same(expected, backbone(pictures(64)))


def test_without_h5py(tmp_path, monkeypatch):
    path = keras_repvgg.write(tmp_path / 'a.weights.h5', {'a': torch.zeros(1)})
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(CheckpointError, match=r"pip install 'mmrep\[keras\]'"):
        import_file(path)


def test_a_file_cut_short(tmp_path):
    model = keras_repvgg.build()
    path = keras_repvgg.write(
        tmp_path / 'a.weights.h5', keras_repvgg.variables(model, True)
    )
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r'cannot be read as weights of Keras'):
        import_file(path)
    assert not (tmp_path / 'imported.pth').exists()


def huge(file):
    file.create_dataset('a', shape=(10**6, 10**6), dtype='f4')


def huge_in_chunks(file):
    file.create_dataset('a', shape=(10**6, 10**6), dtype='f4', chunks=(10, 10))


def one_huge_chunk(file):
    file.create_dataset(
        'a', shape=(4,), maxshape=(None,), dtype='f4', chunks=(10**8,), compression='gzip'
    )


def compressed(file):
    file.create_dataset('a', data=np.zeros((3000, 3000), 'f4'), compression='gzip')


def many_half_large(file):
    for i in range(100):
        file.create_dataset(f'{i}', shape=(10**5,), dtype='f4')


def in_another_file(file):
    file.create_dataset('a', (4,), 'f4', external=[('/etc/passwd', 0, 16)])


def of_another_file(file):
    import h5py

    layout = h5py.VirtualLayout(shape=(4,), dtype='f4')
    layout[:] = h5py.VirtualSource('other.h5', 'a', shape=(4,))
    file.create_virtual_dataset('a', layout)


def text(file):
    file.create_dataset('a', data=['a', 'b'])


def records(file):
    file.create_dataset('a', data=np.zeros(2, [('x', 'f4'), ('y', 'i4')]))


MORE = 'declares much more data than its size'
OTHER = 'in another file'
NO_NUMBERS = 'which is not an array of numbers'


@pytest.mark.parametrize(
    ('make', 'says'),
    [
        *((huge, MORE), (huge_in_chunks, MORE), (one_huge_chunk, MORE), (compressed, MORE)),
        *((many_half_large, MORE), (in_another_file, OTHER), (of_another_file, OTHER)),
        *((text, NO_NUMBERS), (records, NO_NUMBERS)),
    ],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_hostile_files(make, says, tmp_path):
    h5py = pytest.importorskip('h5py')
    path = tmp_path / 'a.weights.h5'
    with h5py.File(path, 'w') as file:
        make(file)
    with pytest.raises(CheckpointError, match=says):
        import_file(path)


def test_links_are_not_followed(tmp_path):
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path / 'other.h5', 'w') as file:
        file['a'] = np.ones(3)
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        file['own'] = np.ones(2)
        file['round'] = h5py.SoftLink('/')
        file['other'] = h5py.ExternalLink(str(tmp_path / 'other.h5'), '/a')
    assert list(read_keras(tmp_path / 'a.h5')) == ['own']


def test_weights_that_are_compressed(tmp_path):
    """As far as weights can be."""
    h5py = pytest.importorskip('h5py')
    values = np.random.default_rng(0).normal(size=(500, 500)).astype('f4')
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        file.create_dataset('a', data=values, compression='gzip')
    assert np.array_equal(read_keras(tmp_path / 'a.h5')['a'].numpy(), values.T)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = keras_repvgg.write(tmp_path / 'a.weights.h5', {'a': torch.zeros(1)})

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr('builtins.open', refuse)
    with pytest.raises(CheckpointError, match='may not be read'):
        import_file(path)


def keras_model(keras, deploy):
    """The network in Keras."""
    layers = keras.layers

    class ConvBn(layers.Layer):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.conv = layers.Conv2D(*args, padding='same', use_bias=False, **kwargs)
            self.bn = layers.BatchNormalization()

        def call(self, x, training=None):
            return self.bn(self.conv(x), training=training)

    class RepVGGBlock(layers.Layer):
        def __init__(self, ins, outs, strides, groups):
            super().__init__()
            options = dict(strides=strides, groups=groups)
            self.rbr_identity = None
            if deploy:
                self.rbr_reparam = layers.Conv2D(outs, 3, padding='same', **options)
                return
            if ins == outs and strides == 1:
                self.rbr_identity = layers.BatchNormalization()
            self.rbr_dense = ConvBn(outs, 3, **options)
            self.rbr_1x1 = ConvBn(outs, 1, **options)

        def call(self, x, training=None):
            if deploy:
                return keras.activations.relu(self.rbr_reparam(x))
            out = self.rbr_dense(x, training=training) + self.rbr_1x1(x, training=training)
            if self.rbr_identity is not None:
                out = out + self.rbr_identity(x, training=training)
            return keras.activations.relu(out)

    class RepVGG(keras.Model):
        def __init__(self, num_blocks, widths, groups, num_classes):
            super().__init__()
            ins, number = widths[0], 0
            self.stage0 = RepVGGBlock(3, ins, 2, 1)
            for i, (count, outs) in enumerate(zip(num_blocks, widths, strict=True), 1):
                blocks = []
                for j in range(count):
                    number += 1
                    strides = 1 if j else 2
                    group = groups.get(number, 1)
                    blocks.append(RepVGGBlock(ins, outs, strides, group))
                    ins = outs
                setattr(self, f'stage{i}', keras.Sequential(blocks))
            self.gap = layers.GlobalAveragePooling2D()
            self.dense = layers.Dense(num_classes)

        def call(self, x, training=None):
            for i in range(5):
                x = getattr(self, f'stage{i}')(x, training=training)
            return self.dense(self.gap(x))

    return RepVGG(**keras_repvgg.ARCH)


@FORMS
def test_with_keras(deploy, tmp_path, monkeypatch):
    # TensorFlow and torch in one process do not always live together.
    monkeypatch.setenv('KERAS_BACKEND', 'torch')
    keras = pytest.importorskip('keras', reason='Keras is not installed')
    model = keras_model(keras, deploy)
    rng = np.random.default_rng(0)
    x = {size: pictures(size) for size in (64, 63)}

    def in_keras(size):
        y = model(x[size].permute(0, 2, 3, 1).numpy(), training=False)
        return torch.from_numpy(np.array(keras.ops.convert_to_numpy(y)))

    in_keras(64)  # builds it
    for variable in model.weights:
        low, high = (0.5, 1.5) if len(variable.shape) == 1 else (-0.2, 0.2)
        variable.assign(rng.uniform(low, high, variable.shape).astype(np.float32))
    path = tmp_path / 'a.weights.h5'
    model.save_weights(path)
    done = import_file(path)
    assert done.backbone == {**FOUND, **(dict(deploy=True) if deploy else {})}
    for size in x:
        assert_same(in_keras(size), logits_of(done.out, x[size]))

    # What the other tests write is what Keras writes.
    import h5py

    shapes = {}

    def see(name, item):
        if isinstance(item, h5py.Dataset):
            shapes[name] = item.shape

    with h5py.File(path) as file:
        file.visititems(see)
    ours = keras_repvgg.variables(keras_repvgg.build(deploy), True)
    assert shapes == {name: tuple(value.shape) for name, value in ours.items()}

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from mmengine.config import Config
from tiny_projects import HEIGHT, WIDTH
from tool_runs import assert_one_sentence, tool, variant

from mmrep.checkpoints import load_strictly, sha256_of
from mmrep.deployment import build_model, enter_scope
from mmrep.reparam import switch_to_deploy


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


class TestDeployFiles:
    def test_what_is_printed(self, pair):
        project, deployed = pair
        meta = read(deployed.checkpoint)['meta']['mmrep']
        lines = [' '.join(line.split()) for line in deployed.log.splitlines()]
        before, after = (
            f'{path.stat().st_size:,}' for path in (project.checkpoint, deployed.checkpoint)
        )
        assert f'verified on an input of shape (1, 3, {HEIGHT}, {WIDTH}):' in lines
        assert 'relative L2' in deployed.log
        assert f'{meta["rel_l2"]:.2e}' in deployed.log
        assert f'{meta["max_abs"]:.2e}' in deployed.log
        assert '100.00%' in deployed.log
        worst = meta['worst_block']
        (row,) = [line for line in lines if 'blocks, worst: ' in line]
        error = max(worst['kernel'], worst['bias'])
        assert worst['name'] in deployed.log and f'{error:.2e}' in row
        assert 'blocks fused: 6' in lines
        params = f'{meta["params_before"]:,} -> {meta["params_after"]:,}'
        assert f'parameters: {params}' in lines
        assert f'file size: {before} -> {after} bytes' in lines
        assert 'written: deploy.pth' in lines
        assert 'deploy.py' in lines

    def test_meta(self, pair):
        project, deployed = pair
        meta = read(deployed.checkpoint)['meta']
        digest = hashlib.sha256(project.checkpoint.read_bytes()).hexdigest()
        assert meta['mmrep']['source_sha256'] == digest
        assert meta['mmrep']['source_config'] == project.config.name
        assert list(meta['dataset_meta']['classes']) == ['dark', 'light']
        assert 'cfg' not in meta

    def test_same_bytes(self, pair, tmp_path, call, formatted):
        """In another process, with other hashes of strings, and another folder and time."""
        project, deployed = pair
        out = tmp_path / 'new' / 'deploy.pth'
        call('reparam', project.config, project.checkpoint, out)
        assert out.read_bytes() == deployed.checkpoint.read_bytes()
        assert out.with_suffix('.py').read_bytes() == deployed.config.read_bytes()

    def test_safetensors(self, classifier, deployed_classifier, tmp_path, call):
        out = tmp_path / 'deploy.safetensors'
        call('reparam', classifier.config, classifier.checkpoint, out)
        found = safetensors.torch.load_file(out)
        expected = read(deployed_classifier.checkpoint)
        assert found.keys() == expected['state_dict'].keys()
        for key, value in expected['state_dict'].items():
            assert torch.equal(found[key], value) and found[key].dtype == value.dtype
        with safetensors.safe_open(out, 'pt') as file:
            meta = json.loads(file.metadata()['meta'])
        assert meta == json.loads(json.dumps(expected['meta']))
        config = Config.fromfile(out.with_suffix('.py'))
        expected = Config.fromfile(deployed_classifier.config)
        expected.fused_checkpoint = dict(file=out.name, sha256=sha256_of(out))
        assert config.to_dict() == expected.to_dict()

    def test_safetensors_predict_the_same(self, classifier, tmp_path, call, predict):
        out = tmp_path / 'deploy.safetensors'
        call('reparam', classifier.config, classifier.checkpoint, out)
        deployed = replace(classifier, config=out.with_suffix('.py'), checkpoint=out)
        assert torch.allclose(predict(deployed), predict(classifier), atol=1e-6)

    def test_it_is_of_the_averaged_weights(self, classifier, deployed_classifier):
        """An EMAHook has put them into the checkpoint's state dict."""
        config = Config.fromfile(classifier.config)
        enter_scope(config)
        whole = torch.load(classifier.checkpoint, weights_only=False)
        last = {
            key.removeprefix('module.'): value
            for key, value in whole['ema_state_dict'].items()
            if key != 'steps'
        }
        written = read(deployed_classifier.checkpoint)['state_dict']
        for state, same in ((whole['state_dict'], True), (last, False)):
            model = build_model(config)
            load_strictly(model, state, 'a.pth')
            switch_to_deploy(model)
            key = 'backbone.stage_2.0.branch_reparam.weight'
            fused = model.state_dict()[key]
            assert torch.allclose(written[key], fused, rtol=1e-5, atol=1e-7) is same

    def test_only_what_it_promises(self, pair):
        project, deployed = pair
        files = {path.name for path in deployed.root.iterdir() if path.is_file()}
        assert files == {'deploy.pth', 'deploy.py', project.config.name}


class TestOptions:
    def test_all(self, classifier, tmp_path, call, capsys):
        out = tmp_path / 'new' / 'out.pth'
        options = ['--shape', '3,8,20', '--seed', 7, '--rtol', '1e-3']
        options += ['--cfg-options', 'work_dir=elsewhere']
        call('reparam', classifier.config, classifier.checkpoint, out, *options)
        assert 'shape (1, 3, 8, 20)' in capsys.readouterr().out
        meta = read(out)['meta']['mmrep']
        assert (meta['input_shape'], meta['seed']) == ([1, 3, 8, 20], 7)
        assert Config.fromfile(out.with_suffix('.py')).work_dir == 'elsewhere'

    @pytest.mark.parametrize('text', ['8', '8,8', '3x8x8'])
    def test_shape(self, classifier, tmp_path, call, text):
        out = tmp_path / 'out.pth'
        call('reparam', classifier.config, classifier.checkpoint, out, '--shape', text)
        assert read(out)['meta']['mmrep']['input_shape'] == [1, 3, 8, 8]

    @pytest.mark.parametrize('numbers', [['8', '20'], ['3', '8', '20']])
    def test_shape_as_the_hosts_take_it(self, classifier, tmp_path, call, numbers):
        out = tmp_path / 'out.pth'
        files = [classifier.config, classifier.checkpoint, out]
        call('reparam', *files, '--shape', *numbers)
        call('reparam', '--overwrite', '--shape', *numbers, *files)
        assert read(out)['meta']['mmrep']['input_shape'] == [1, 3, 8, 20]

    def test_home(self, classifier, tmp_path, call, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        shutil.copy(classifier.config, tmp_path / 'net.py')
        shutil.copy(classifier.checkpoint, tmp_path / 'net.pth')
        call('reparam', '~/net.py', '~/net.pth', '~/out.pth')
        assert read(tmp_path / 'out.pth')['meta']['mmrep']['source_sha256']
        assert (tmp_path / 'out.py').exists()

    def test_overwrite(self, classifier, tmp_path, call):
        out = tmp_path / 'out.pth'
        out.write_text('old')
        call('reparam', classifier.config, classifier.checkpoint, out, '--overwrite')
        assert read(out)


class TestWrongInput:
    """Ends with one sentence, and writes nothing."""

    @pytest.fixture
    def refuse(self, classifier, tmp_path, refused):
        def refuse(
            *options,
            says,
            config=classifier.config,
            checkpoint=classifier.checkpoint,
            out='',
        ) -> None:
            before = {path: path.read_bytes() for path in files(tmp_path)}
            out = tmp_path / (out or 'out.pth')
            refused('reparam', config, checkpoint, out, *options, says=says)
            assert {path: path.read_bytes() for path in files(tmp_path)} == before

        def files(folder: Path) -> list[Path]:
            return sorted(path for path in folder.rglob('*') if path.is_file())

        return refuse

    def test_process(self, classifier, tmp_path):
        """As a user sees it."""
        short = tmp_path / 'short.pth'
        shutil.copy(classifier.checkpoint, short)
        os.truncate(short, 30_000)
        done = tool('reparam', classifier.config, short, tmp_path / 'out.pth')
        assert done.returncode == 1
        assert done.stdout == ''
        assert_one_sentence(done.stderr, f'{short} cannot be read', 'cut short')
        assert os.listdir(tmp_path) == ['short.pth']

    def test_config(self, tmp_path, refuse):
        refuse(config=tmp_path / 'no.py', says='no.py does not exist')

    def test_checkpoint(self, tmp_path, refuse):
        refuse(checkpoint=tmp_path / 'no.pth', says='no.pth does not exist')

    def test_config_of_another_model(self, segmentor, refuse):
        says = (f'{segmentor.checkpoint} does not fit the config', '8 unexpected')
        refuse(checkpoint=segmentor.checkpoint, says=says)

    def test_deploy_form(self, classifier, deployed_classifier, refuse):
        config, checkpoint = deployed_classifier.config, deployed_classifier.checkpoint
        refuse(checkpoint=checkpoint, says='in deploy form already')
        refuse(config=config, checkpoint=checkpoint, says='in deploy form already')
        refuse(config=config, says='it is in train form and the config is not')

    def test_nothing_to_fuse(self, classifier, tmp_path, refuse):
        backbone = dict(_delete_=True, type='ResNet', depth=18)
        config = variant(classifier.config, tmp_path, model=dict(backbone=backbone))
        refuse(config=config, says='nothing in this config can be re-parameterized')

    def test_group_norm(self, classifier, tmp_path, refuse):
        norm = dict(type='GN', num_groups=2)
        entries = dict(model=dict(backbone=dict(norm_cfg=norm)))
        config = variant(classifier.config, tmp_path, **entries)
        checkpoint = tmp_path / 'group.pth'
        model = build_model(Config.fromfile(config))
        torch.save(model.state_dict(), checkpoint)
        says = ('cannot be fused', 'backbone.stem.branch_3x3', 'GroupNorm')
        refuse(config=config, checkpoint=checkpoint, says=says)

    def test_verification(self, refuse):
        refuse('--rtol', '1e-9', says=('(relative L2)', 'more than', 'nothing was written'))

    def test_weight_that_is_not_finite(self, classifier, tmp_path, refuse):
        whole = torch.load(classifier.checkpoint, weights_only=False)
        whole['state_dict']['backbone.stem.branch_1x1.norm.bias'][0] = float('nan')
        checkpoint = tmp_path / 'nan.pth'
        torch.save(whole, checkpoint)
        says = ('backbone.stem: its output is not finite',)
        refuse(checkpoint=checkpoint, says=says)

    def test_out(self, tmp_path, refuse):
        refuse(out='out.onnx', says='must end in .pth')
        for name in ('out.pth', 'out.py'):
            path = tmp_path / name
            path.write_text('precious')
            refuse(says=(f'{name} exists', '--overwrite'))
            path.unlink()
        (tmp_path / 'file').touch()
        refuse(out='file/out.pth', says='file')

    def test_shape(self, refuse):
        refuse('--shape', '4,8,8', says='give a fitting --shape')
        refuse('--shape', '9000000', says='does not fit into memory')

    @pytest.mark.parametrize('text', ['', 'a', '3,0,8', '1,3,8,8', '-8'])
    def test_no_shape(self, classifier, tmp_path, call, capsys, text):
        options = [classifier.config, classifier.checkpoint, tmp_path / 'out.pth']
        with pytest.raises(SystemExit, match='2'):
            call('reparam', *options, f'--shape={text}')
        assert 'is not a shape: give C,H,W' in capsys.readouterr().err

    def test_code_is_not_run(self, tmp_path, refuse):
        class Payload:
            def __reduce__(self):
                return os.system, (f'touch {tmp_path}/canary',)

        checkpoint = tmp_path / 'evil.pth'
        torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': Payload()}, checkpoint)
        refuse(checkpoint=checkpoint, says='posix.system, which could run code')

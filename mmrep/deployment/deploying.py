"""From a train-form checkpoint to a verified deploy checkpoint and its config."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os.path import expanduser, isfile
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmrep.checkpoints import (
    is_deploy_form,
    kept_meta,
    load_strictly,
    out_path,
    read_checkpoint,
    refuse_existing,
    sha256_of,
    state_dict_of,
)
from mmrep.errors import CheckpointError, ConfigError, UserError
from mmrep.reparam import (
    DeployReport,
    branch_by_branch,
    compare_named,
    count_parameters,
    flatten_outputs,
    reparam_blocks,
)
from mmrep.version import __version__

from .building import build_model
from .config import (
    DEPLOYED,
    Shape,
    deploy_config,
    input_shape,
    is_deploy_config,
    is_expanded,
)
from .config_text import written_config
from .host import HostConfig, host_config
from .pair import write_pair
from .running import check_differences, fuse, run_form, seeded_input, to_plain
from .verification import Verification, check_rtol, observe, verify

_NO_TRAIN_FORM = (
    'the model of this config has no train form: give the config that it was trained '
    'with, without deploy=True'
)
_NOTHING = (
    'nothing in this config can be re-parameterized: give a config with a backbone that '
    "can, as type='mmrep.RepVGG'"
)

#: The largest relative L2 error between two models that compute the same operations.
_SAME = 1e-6


@dataclass(frozen=True)
class Deployed:
    """What :func:`deploy_checkpoint` did.

    Args:
        report: Blocks and parameters.
        verification: How far the deploy form is from the train form.
        shape: Shape of the input of both: batch, channels, height, width.
        out: The deploy checkpoint.
        out_config: The deploy config.
        bytes_before: Size of the source file.
        bytes_after: Size of the deploy checkpoint.
    """

    report: DeployReport
    verification: Verification
    shape: tuple[int, ...]
    out: Path
    out_config: Path
    bytes_before: int
    bytes_after: int


def deploy_checkpoint(
    config: Config,
    checkpoint: str | Path,
    out: str | Path,
    shape: Shape | None = None,
    rtol: float = 1e-4,
    seed: int = 0,
    overwrite: bool = False,
    source_config: str | Path = '',
    host: bool = False,
) -> Deployed:
    """Fuse a checkpoint, verify the result, and write it with its deploy config.

    The train form computes branch by branch on a seeded input; the deploy form is a model
    built from the deploy config that is written, with the weights that are written. Each
    block is compared with its branches, then the outputs and the backbone's features.

    Args:
        config: The config that the checkpoint was trained with.
        checkpoint: The train-form checkpoint.
        out: The deploy checkpoint, ``.pth`` or ``.safetensors``; its config is written
            beside it as ``.py``; see ``write_pair``.
        shape: Channels, height and width of the input. Default: the config's.
        rtol: The largest relative L2 error allowed. Default: 1e-4.
        seed: Seed of the input. Default: 0.
        overwrite: Whether to replace existing files. Default: False.
        source_config: The config's file, for the record. Default: ''.
        host: Whether to write the model with the host's own bodies, which run without
            mmrep; see ``host_config``. Default: False.

    Raises:
        UserError: With one sentence, if anything is wrong; then nothing is written.
    """
    # A string: a Path would turn the '//' of a URL into '/'.
    checkpoint = expanduser(checkpoint)
    out = out_path(out, '.pth', '.safetensors')
    source_config = Path(expanduser(source_config))
    out_config = out.with_suffix('.py')
    for source in (checkpoint, source_config):
        if Path(source).resolve() in (out.resolve(), out_config.resolve()):
            raise UserError(f'{out} would replace {source}: give another name')
    refuse_existing(out, out_config, overwrite=overwrite)
    of_host = host_config(config) if host else None
    deployed_config = deploy_config(of_host.config if of_host else config)
    # Read back from text: what is verified is what is written.
    text, deployed_config = written_config(deployed_config)
    shape = shape or input_shape(config)
    check_rtol(rtol)
    with ThreadPoolExecutor(1) as beside:
        # Hashing takes a second for half a gigabyte, here in parallel to the rest. If the
        # file does not exist, reading the checkpoint raises the error.
        is_file = isfile(checkpoint)
        digest = beside.submit(sha256_of, checkpoint) if is_file else None
        model, report, verification, meta = _fuse(
            config, of_host, deployed_config, checkpoint, shape, rtol, seed
        )
    meta['mmrep'] = {
        'version': __version__,
        'source': Path(checkpoint).name,
        'source_sha256': digest.result(),
        'source_config': source_config.name,
        'input_shape': [1, *shape],
        'seed': seed,
        **verification.record(),
        'blocks': len(report.switched),
        'params_before': report.params_before,
        'params_after': report.params_after,
    }
    write_pair(out, out_config, model.state_dict(), meta, text, source_config.name)
    return Deployed(
        report,
        verification,
        (1, *shape),
        out,
        out_config,
        Path(checkpoint).stat().st_size,
        out.stat().st_size,
    )


def _fuse(
    config: Config,
    of_host: HostConfig | None,
    deployed_config: Config,
    checkpoint: str,
    shape: Shape,
    rtol: float,
    seed: int,
) -> tuple[nn.Module, DeployReport, Verification, dict]:
    """Load a checkpoint, fuse its model, and compare the deploy form with the train form.

    Returns:
        The deploy form, the report of what was fused, how far it is from the train form,
        and what to keep of the checkpoint's ``meta``.
    """
    # Not memory-mapped: a map counts as memory until its last tensor is freed, while
    # tensors that were read are freed block by block, as the blocks are fused.
    source = read_checkpoint(checkpoint, mmap=False)
    state_dict = state_dict_of(source, checkpoint)
    if is_deploy_form(state_dict):
        raise CheckpointError(
            f'{checkpoint} is in deploy form already: test it with its deploy config'
        )
    model = build_model(config, unset=True)
    if deployed_config.model.get('type') == DEPLOYED and not reparam_blocks(model):
        raise ConfigError(_NOTHING)
    load_strictly(model, state_dict, checkpoint, assign=True)
    if is_deploy_config(config):
        raise ConfigError(_NO_TRAIN_FORM)
    meta = kept_meta(source)
    # The model alone holds the weights from here on.
    del source, state_dict
    before = count_parameters(model)
    if of_host is not None:
        model = _in_the_host(model, of_host, seeded_input((1, *shape), seed))
        config = of_host.config
    expanded = is_expanded(config)
    train_form = observe(model, (1, *shape), seed, expanded)
    trained = set(model.state_dict())
    norms = to_plain(model, train_form.x) if expanded else {}
    report = fuse(model)
    report.switched = [*norms, *report.switched]
    report.params_before = before
    # A plain network has no blocks, but its norms can be fused.
    if not report.switched and set(model.state_dict()) == trained:
        raise ConfigError(_NO_TRAIN_FORM)
    deployed = build_model(deployed_config, unset=True, how=' in deploy form')
    load_strictly(deployed, model.state_dict(), 'the fused model', assign=True)
    return deployed, report, verify(train_form, deployed, rtol, norms), meta


def _in_the_host(model: nn.Module, host: HostConfig, x: Tensor) -> nn.Module:
    """Build the host's model of a ``HostConfig``, and load a model's weights into it.

    Raises:
        UserError: If the two models do not compute the same.
    """
    twin = build_model(host.config, unset=True, how=' for --host')
    weights = host.renamed(model.state_dict())
    for key, own in twin.state_dict().items():
        # Some hosts' convs have a bias before a norm.
        if key.endswith('.conv.bias') and key not in weights:
            weights[key] = torch.zeros_like(own)
    load_strictly(twin, weights, 'the model for --host', assign=True)
    outputs = []
    for form in (model, twin):
        with branch_by_branch(form):
            outputs.append(flatten_outputs(run_form(form, x, 'train')))
    remedy = 'leave --host out'
    check_differences(compare_named(*outputs), _SAME, "from the config's model", remedy)
    return twin

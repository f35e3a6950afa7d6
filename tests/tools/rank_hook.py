"""A hook that tells what the parameters of every process are; imported by configs."""

import hashlib
import json
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class RankHook(Hook):
    """Write the digests of all parameters and buffers, a file for each rank.

    Those of averaged models are among them, and which parameters have not moved.
    """

    def before_train(self, runner: Runner) -> None:
        self.before = digests(runner, 'named_parameters')

    def after_train(self, runner: Runner) -> None:
        after = digests(runner, 'named_parameters')
        content = dict(
            parameters=after,
            buffers=digests(runner, 'named_buffers'),
            still=[key for key in after if after[key] == self.before[key]],
        )
        path = Path(runner.work_dir) / f'rank_{get_rank()}.json'
        path.write_text(json.dumps(content))


def digests(runner: Runner, kind: str) -> dict[str, str]:
    """The SHA-256 of the bytes of every tensor."""
    models = [runner.model, *(h.ema_model for h in runner.hooks if isinstance(h, EMAHook))]
    return {
        f'{index}.{key}': hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
        for index, model in enumerate(models)
        for key, value in getattr(model, kind)()
    }

"""A hook that ends a training in its midst; configs import it by its name."""

import os
import signal

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class StopHook(Hook):
    """Stop before an iteration, by SIGKILL or by an exception."""

    def __init__(self, iteration: int, kill: bool) -> None:
        self.iteration, self.kill = iteration, kill

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == self.iteration:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt

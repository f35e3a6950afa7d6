"""What training and testing need beyond mmengine."""

from .equivalent_kernel_decay_hook import EquivalentKernelDecayHook, equivalent_kernel_l2
from .plain_checkpoint_hook import PlainCheckpointHook
from .random_state_hook import RandomStateHook
from .resume_hook import ResumeHook, check_training
from .switch_to_deploy_hook import SwitchToDeployHook

__all__ = [
    'EquivalentKernelDecayHook',
    'PlainCheckpointHook',
    'RandomStateHook',
    'ResumeHook',
    'SwitchToDeployHook',
    'check_training',
    'equivalent_kernel_l2',
]

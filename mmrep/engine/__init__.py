"""Hooks, an optimizer constructor, an initializer and a visualizer backend for mmengine."""

from .equivalent_kernel_decay_hook import EquivalentKernelDecayHook, equivalent_kernel_l2
from .picture_folder import PictureFolder
from .plain_checkpoint_hook import PlainCheckpointHook
from .random_state_hook import RandomStateHook
from .rep_optimizer_constructor import RepOptimizerConstructor
from .resume_hook import ResumeHook, check_training
from .searched_scales import SearchedScalesInit
from .switch_to_deploy_hook import SwitchToDeployHook

__all__ = [
    'EquivalentKernelDecayHook',
    'PictureFolder',
    'PlainCheckpointHook',
    'RandomStateHook',
    'RepOptimizerConstructor',
    'ResumeHook',
    'SearchedScalesInit',
    'SwitchToDeployHook',
    'check_training',
    'equivalent_kernel_l2',
]

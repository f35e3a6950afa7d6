"""What training and testing need beyond mmengine."""

from .equivalent_kernel_decay_hook import EquivalentKernelDecayHook, equivalent_kernel_l2
from .switch_to_deploy_hook import SwitchToDeployHook

__all__ = [
    'EquivalentKernelDecayHook',
    'SwitchToDeployHook',
    'equivalent_kernel_l2',
]

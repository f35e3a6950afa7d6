"""What training and testing need beyond mmengine."""

from .channels_last_hook import ChannelsLastHook, to_channels_last
from .equivalent_kernel_decay_hook import EquivalentKernelDecayHook, equivalent_kernel_l2
from .switch_to_deploy_hook import SwitchToDeployHook

__all__ = [
    'ChannelsLastHook',
    'EquivalentKernelDecayHook',
    'SwitchToDeployHook',
    'equivalent_kernel_l2',
    'to_channels_last',
]

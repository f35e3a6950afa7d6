_base_ = 'repvgg-tiny_1xb64_fashion-mnist.py'

# The optimizer does not decay these kernels: the hook adds a penalty of the equivalent
# kernel to the loss.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'branch_3x3.conv': dict(decay_mult=0.0),
            'branch_1x1.conv': dict(decay_mult=0.0),
        }
    ),
)
custom_hooks = [dict(type='mmrep.EquivalentKernelDecayHook', weight_decay=1e-4)]

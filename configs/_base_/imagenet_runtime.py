_base_ = 'mmpretrain_runtime.py'

default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(interval=1, max_keep_ckpts=3),
)

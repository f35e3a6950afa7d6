_base_ = 'mmseg_runtime.py'

env_cfg = dict(cudnn_benchmark=True)
default_hooks = dict(checkpoint=dict(interval=4000))

tta_model = dict(type='SegTTAModel')

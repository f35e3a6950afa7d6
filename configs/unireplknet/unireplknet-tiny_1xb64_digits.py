_base_ = [
    '../_base_/models/unireplknet-tiny.py',
    '../_base_/datasets/digits_bs64.py',
    '../_base_/schedules/digits_adamw_bs64_15e.py',
    '../_base_/mmpretrain_runtime.py',
]

_base_ = 'dbb-r50-d8.py'

model = dict(decode_head=dict(type='FCNHead'))

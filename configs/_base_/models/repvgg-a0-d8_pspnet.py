_base_ = 'repvgg-a0-d8.py'

model = dict(decode_head=dict(type='PSPHead'))

_base_ = 'mmpretrain::hrnet/hrnet-w18_4xb32_in1k.py'

model = dict(
    type='mmrep.Expanded',
    expand=dict(of='ImageClassifier', block=dict(type='mmrep.DiverseBranchBlock')),
)

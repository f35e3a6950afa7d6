_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'

model = dict(
    type='mmrep.Expanded',
    expand=dict(of='ImageClassifier', block=dict(type='mmrep.DiverseBranchBlock')),
)

_base_ = 'resnet18-tiny_1xb64_digits.py'

model = dict(
    type='mmrep.Expanded',
    expand=dict(of='ImageClassifier', block=dict(type='mmrep.DiverseBranchBlock')),
)

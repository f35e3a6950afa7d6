"""The types of the public interface: mypy checks this file, which is never run."""

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import mmrep
from mmrep.deployment import (
    Deployed,
    OnnxExport,
    deploy_checkpoint,
    export_onnx,
    read_config,
)
from mmrep.expansion import Expansion, collapse, expand
from mmrep.importers import Imported, import_checkpoint
from mmrep.models.backbones import RepVGG
from mmrep.models.blocks import RepVGGBlock
from mmrep.quantization import QuantizedOnnx, quantize_onnx
from mmrep.reparam import (
    DeployReport,
    Difference,
    compare_outputs,
    fuse_bn,
    measure_norms,
    switch_to_deploy,
)

x = torch.rand(1, 3, 32, 32)
backbone = RepVGG('A0', frozen_stages=1, norm_eval=True, with_cp=False)
block = RepVGGBlock(3, 8, stride=2)
weight, bias = block.equivalent_kernel_bias()
assert_type(weight, Tensor)
assert_type(bias, Tensor)
assert_type(switch_to_deploy(backbone), DeployReport)
assert_type(measure_norms(backbone, lambda: backbone(x)), int)
assert_type(compare_outputs({'y': x}, {'y': x}), dict[str, Difference])
assert_type(expand(nn.Sequential(), dict(type='mmrep.RepVGGBlock'), x), Expansion)
collapse(nn.Sequential())

config = read_config('config.py')
assert_type(deploy_checkpoint(config, 'a.pth', 'b.pth'), Deployed)
assert_type(export_onnx(config, Path('a.pth'), 'b.onnx', dynamic=True), OnnxExport)
assert_type(quantize_onnx(config, 'a.pth', 'b.onnx', max_drop=1.0), QuantizedOnnx)
assert_type(import_checkpoint('a.pth', 'b.pth'), Imported)
assert_type(fuse_bn(weight, bias, bias, bias, 1e-5), tuple[Tensor, Tensor])
assert_type(mmrep.list_models('*dbb*'), list[str])
assert_type(mmrep.get_model('repvgg-a0', deploy=True), nn.Module)

# Wrong arguments are reported.
RepVGGBlock(3, '8')  # type: ignore[arg-type]
mmrep.get_model(1)  # type: ignore[arg-type]

"""Compare an ONNX file with the model that it was made of, by ONNX Runtime."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmrep.errors import reason
from mmrep.reparam import Difference, compare_tensors

from .running import VerificationError, check_differences


class Reference(NamedTuple):
    """An input, and what the checkpoint's model makes of it, by the output's name."""

    x: Tensor
    outputs: dict[str, Tensor]


#: The shape of each input that was compared, and the difference of each output by name.
Comparisons = list[tuple[tuple[int, ...], dict[str, Difference]]]


def verify(path: Path, references: list[Reference], rtol: float) -> Comparisons:
    """Check a file and compare its outputs.

    Raises:
        VerificationError: If it is not a valid graph, cannot be run, or an output is not
            within ``rtol`` of its reference.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(path), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
    except Exception as error:
        raise VerificationError(
            f'ONNX Runtime cannot load the exported graph ({reason(error)}): nothing was '
            'written; try another --opset, or a model without operators of its own'
        ) from error
    comparisons = []
    for x, outputs in references:
        shape = tuple(x.shape)
        remedy = (
            'try another --opset, or report the config'
            if x.shape == references[0].x.shape
            else 'leave --dynamic out'
        )
        try:
            results = session.run(list(outputs), {'input': x.numpy()})
            differences = {
                name: compare_tensors(output, torch.from_numpy(result))
                for (name, output), result in zip(outputs.items(), results, strict=True)
            }
        except Exception as error:
            raise VerificationError(
                f'the exported graph fails on an input of shape {shape} '
                f'({reason(error)}): nothing was written; {remedy}'
            ) from error
        check_differences(
            differences,
            rtol,
            "between the exported graph and the checkpoint's model on an input of shape "
            f'{shape}',
            remedy,
        )
        comparisons.append((shape, differences))
    return comparisons

"""A dense encoder under ONNX Runtime, the way to run one on a CPU that people compare with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.errors import BackendError
from support.harness import Prepared


def exported(
    model: Any, inputs: Mapping[str, Tensor], file: Path, output: str = "last_hidden_state"
) -> Callable[[], Prepared]:
    """One output of a model, such as its token states, for inputs of this shape.

    Args:
        model: of transformers, on the CPU.
        file: the exported model, which is written where it is not there yet.
    """

    def make() -> Prepared:
        _check(model.dtype, file)
        if not file.is_file():
            _export(_OneOutput(model, output), inputs, file)
        session = _Session(file, inputs)
        return Prepared(session, session.forget)

    return make


def _check(dtype: torch.dtype, file: Path) -> None:
    if dtype != torch.float32:
        raise BackendError(f"ONNX Runtime is measured in fp32 only, not in {dtype}; choose that dtype")
    wanted = ["onnxruntime"] if file.is_file() else ["onnxruntime", "onnxscript"]
    if missing := [package for package in wanted if find_spec(package) is None]:
        raise BackendError(f"ONNX Runtime is left out without {' and '.join(missing)}; pip install {' '.join(missing)}")


def _export(model: nn.Module, inputs: Mapping[str, Tensor], file: Path) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    with warnings.catch_warnings():
        # Of deprecated parts of the exporter itself.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, kwargs=dict(inputs), f=partial, input_names=list(inputs), output_names=["output"],
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    partial.rename(file)


class _OneOutput(nn.Module):
    """A model whose output is one tensor."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, **inputs: Tensor) -> Tensor:
        found: Tensor = self.model(**inputs)[self.name]
        return found


class _Session:
    """An exported model with the inputs that it is called with."""

    def __init__(self, file: Path, inputs: Mapping[str, Tensor]) -> None:
        self._file = file
        self._inputs = {name: values.numpy() for name, values in inputs.items()}
        self.forget()

    def forget(self) -> None:
        """Start anew, without the memory that earlier calls left to later ones."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(self._file, options, providers=["CPUExecutionProvider"])

    def __call__(self) -> Tensor:
        (output,) = self._session.run(None, self._inputs)
        return torch.from_numpy(output)

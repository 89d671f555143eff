"""f(Y_g) * Y_u of two lifts side by side on Triton."""

from __future__ import annotations

import pytest
import torch

from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.kernels.gate import gate
from flashsvd.kernels.launch import Backend
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_runs_accurately, on_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 40), (2, 2048), (5, 2500)])
def test_any_size(tokens: int, width: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(gate, Operands(dtype)(tokens, 2 * width))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    assert_runs_accurately(gate, Operands(torch.float32)(4, 60), activation=activation)


def test_strided_rows_and_a_place_for_the_result() -> None:
    wide, place = Operands(torch.float32)(6, 100), torch.full((6, 50), torch.nan, device=DEVICE)
    y, out = wide[:, 7:67], place[:, 3:33]
    with on_triton():
        result = gate(y, backend="triton", out=out)
    assert result is out
    torch.testing.assert_close(out, gate(y, backend="torch"))
    assert int(place.isnan().sum()) == 6 * 20


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_operands_that_do_not_fit_are_refused(backend: Backend) -> None:
    y = Operands(torch.float32)(3, 8)
    with pytest.raises(ValueError, match="do not fit"):
        gate(y[:, :7], backend=backend)
    with pytest.raises(ValueError, match="do not fit"):
        gate(y, backend=backend, out=y)
    with pytest.raises(ValueError, match="is not one of"):
        gate(y, backend=backend, activation="tan")


def test_no_rows() -> None:
    with on_triton():
        assert gate(Operands(torch.float32)(0, 8), backend="triton").shape == (0, 4)

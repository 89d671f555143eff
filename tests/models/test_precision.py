"""Whether a model's numbers are finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flashsvd.errors import ConfigError, ModelError
from flashsvd.models.precision import cast, check_finite, first_not_finite, is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_are_found_wherever_they_are(dtype: torch.dtype) -> None:
    assert is_finite(torch.empty(0, 3, dtype=dtype))
    assert is_finite(torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype))
    for value in (math.nan, math.inf, -math.inf):
        values = torch.zeros(3, 5, dtype=dtype)
        values[1, 4] = value
        assert not is_finite(values)


def test_the_first_parameter_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert first_not_finite(model) is None
    # What is read from elsewhere counts in the place of what is in memory.
    elsewhere = {"0.bias": torch.tensor([0.0, math.nan])}
    assert first_not_finite(model, elsewhere.get) == "0.bias"
    with torch.no_grad():
        model[1].weight[0, 1] = math.inf
    assert first_not_finite(model) == "1.weight"
    assert first_not_finite(model, {"1.weight": torch.zeros(2, 2)}.get) is None
    with pytest.raises(ModelError, match=r"1\.weight holds NaN or infinite values"):
        check_finite(model)


def test_a_cast_that_overflows_is_refused_by_name() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1e6)
    with pytest.raises(ConfigError, match="weight has values too large for float16"):
        cast(model, torch.float16)

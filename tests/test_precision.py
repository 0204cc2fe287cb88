"""Norms, exponents and the error of what does not fit."""

import math

import pytest
import torch

from isopo_mini import precision

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_least_single_precision(dtype: torch.dtype) -> None:
    value = torch.ones(2, dtype=dtype, requires_grad=True)
    promoted = precision.at_least_float32(value)
    assert promoted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    promoted.sum().backward()
    assert value.grad is not None
    assert value.grad.dtype == dtype
    assert precision.common_dtype([value, value]) == promoted.dtype
    assert precision.common_dtype([value, value.double()]) == torch.float64
    assert precision.common_dtype([]) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_overflows_only_where_it_does(dtype: torch.dtype) -> None:
    numbers = torch.randn(3, 4, dtype=dtype)
    limits = torch.finfo(dtype)
    for unit in (1.0, limits.max / 100, limits.tiny * 1e4):
        for mean in (False, True):
            given = precision.euclidean_norm(unit * numbers, dim=1, mean=mean)
            expected = unit * numbers.norm(dim=1) / (2 if mean else 1)
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=0)
    assert precision.euclidean_norm(torch.zeros(2, 3, dtype=dtype), dim=1).tolist() == [0.0, 0.0]
    assert precision.euclidean_norm(torch.full((4,), limits.max, dtype=dtype), dim=0).item() == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_exponent_is_the_last_that_fits(dtype: torch.dtype) -> None:
    limit = torch.tensor(precision.largest_exponent(dtype), dtype=torch.promote_types(dtype, torch.float32))
    assert torch.isfinite(limit.exp().to(dtype))
    assert torch.isinf((limit * 1.01).exp().to(dtype))


def test_what_does_not_fit_is_named() -> None:
    fits = torch.tensor([[1.0, 3e38]])
    assert precision.require_fits("sum", fits) is fits
    with pytest.raises(ValueError, match=r"^sum: expected numbers that fit float32, got inf at index \(0, 1\)$"):
        precision.require_fits("sum", 10 * fits)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.clip import search_qparams
from mono_quant_fx.numerics.gptq import hessian_error
from mono_quant_fx.numerics.rounding import RoundingOptions, round_weight

#: Two sums of the same float32 terms, taken in different order.
SUM = 1e-5


def group_errors(w, scale, zero_point, scheme, energy):
    codes = affine.quantize(w, scale, zero_point, scheme)
    error = (w.float() - affine.dequantize(codes, scale, zero_point, scheme.group_size).float()) ** 2 * energy
    return torch.cat([part.sum(-1) for part, _ in affine.grouped(error, scheme.group_size)], 1)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([8, 32, -1]), st.booleans(), st.integers(0, 1000))
def test_no_group_is_worse_than_with_the_scale_of_its_extremes(n, k, group, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) ** 3
    energy, scheme = torch.rand(k, generator=generator), QuantScheme(4, group, symmetric)
    plain = group_errors(w, *affine.choose_qparams(w, scheme), scheme, energy)
    found = group_errors(w, *search_qparams(w, scheme, energy), scheme, energy)
    assert (found <= plain * (1 + SUM) + 1e-12).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_is_clipped_when_it_is_worth_it(symmetric):
    torch.manual_seed(1)
    w, scheme = torch.randn(64, 128), QuantScheme(4, 128, symmetric)
    w[:, 0] = 12.0
    silent = torch.ones(128)
    silent[0] = 0.0  # the outlier's column carries nothing
    plain = group_errors(w, *affine.choose_qparams(w, scheme), scheme, silent).sum()
    weighted = group_errors(w, *search_qparams(w, scheme, silent), scheme, silent).sum()
    alike = group_errors(w, *search_qparams(w, scheme), scheme, silent).sum()
    assert weighted < 0.6 * plain
    assert weighted < alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_what_is_stored(dtype):
    w = torch.randn(8, 64).to(dtype)
    scale, zero_point = search_qparams(w, QuantScheme(4, 32, False))
    assert (scale.dtype, zero_point.dtype, tuple(scale.shape)) == (dtype, torch.int8, (8, 2))
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())


def test_zero_groups_and_nan():
    scale, _ = search_qparams(torch.zeros(2, 16), QuantScheme(4, 16))
    assert bool((scale > 0).all())
    with pytest.raises(mq.WeightError, match="it holds NaN or infinity"):
        search_qparams(torch.full((2, 16), float("nan")), QuantScheme(4, 16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_row_that_clip_stores_is_worse_than_rounding_even_where_inputs_are_correlated(symmetric):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    x += 0.1 * torch.randn(300, 64, generator=generator)
    w, h, scheme = torch.randn(64, 64, generator=generator), x.T @ x, QuantScheme(4, 32, symmetric)

    def errors(scale, zero_point):
        return hessian_error(w, affine.quantize(w, scale, zero_point, scheme), scale, zero_point, h, scheme)

    plain, searched = errors(*affine.choose_qparams(w, scheme)), errors(*search_qparams(w, scheme, h.diagonal()))
    assert (searched > plain).any() and (searched < plain).any()
    packed, scale, zero_point = round_weight(w, scheme, h[None], RoundingOptions("clip")).stored
    found = hessian_error(w, affine.unpack_int4(packed, 64), scale, zero_point, h, scheme)
    assert torch.equal(found, torch.minimum(plain, searched))

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq
from mono_quant_fx import gptq as module
from mono_quant_fx import numerics
from mono_quant_fx.clip import search_qparams
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.gptq import gptq, hessian_error

#: Two float32 sums of the same terms.
SUM = 1e-4


def problem(n, k, seed=0, samples=200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.5 * torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(samples, k, generator=generator) * torch.rand(k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator), x.T @ x


def textbook(w, h, scheme, damping, order):
    """Optimal brain quantization with its order given: the inverse Hessian is downdated by elimination, in float64."""
    scale, zero_point = search_qparams(w, scheme, h.diagonal())
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    size = w.shape[1] if scheme.group_size == -1 else scheme.group_size
    h = h.double()
    inverse = torch.linalg.inv(h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64))
    work, codes = w.double().clone(), torch.zeros(w.shape)
    for p in order.tolist():
        s, z = scale[:, p // size].double(), zero_point[:, p // size].double()
        codes[:, p] = (torch.round(work[:, p] / s) + z).clamp(-8, 7)
        error = (work[:, p] - (codes[:, p] - z) * s) / inverse[p, p]
        work -= torch.outer(error, inverse[p])
        inverse -= torch.outer(inverse[:, p], inverse[p]) / inverse[p, p]
    return codes.to(torch.int8), scale, zero_point


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "activation_order"), [(-1, False), (-1, True), (16, True)])
@pytest.mark.parametrize("block", [8, 128])
def test_it_equals_the_textbook(group, activation_order, symmetric, block, monkeypatch):
    monkeypatch.setattr(module, "B", block)
    scheme = QuantScheme(4, group, symmetric)
    w, h = problem(12, 48)
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if activation_order else torch.arange(48)
    codes, scale, zero_point = gptq(w, h, scheme, damping=0.01, activation_order=activation_order)
    expected, expected_scale, expected_zero = textbook(w, h, scheme, 0.01, order)
    assert torch.equal(scale, expected_scale)
    zero = torch.zeros_like(expected_zero) if zero_point is None else zero_point
    assert torch.equal(zero, expected_zero)
    better = hessian_error(w, expected, scale, zero_point, h, scheme) <= hessian_error(
        w, numerics.quantize(w, scale, zero_point, scheme), scale, zero_point, h, scheme
    )
    assert better.float().mean() > 0.8
    assert torch.equal(codes[better], expected[better])


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.integers(1, 6), st.integers(1, 60), st.sampled_from([8, 24, 128, -1]), st.booleans(), st.booleans(),
    st.integers(0, 999),
)  # fmt: skip
def test_no_row_is_worse_than_plain_rounding_with_the_same_scales(n, k, group, symmetric, ordered, seed):
    w, h = problem(n, k, seed, samples=40)
    scheme = QuantScheme(4, group, symmetric)
    codes, scale, zero_point = gptq(w, h, scheme, activation_order=ordered)
    assert int(codes.min()) >= -8 and int(codes.max()) <= 7
    plain = hessian_error(w, numerics.quantize(w, scale, zero_point, scheme), scale, zero_point, h, scheme)
    assert (hessian_error(w, codes, scale, zero_point, h, scheme) <= plain * (1 + SUM)).all()


@pytest.mark.parametrize("ordered", [True, False])
def test_it_is_far_better_than_rounding_where_inputs_are_correlated(ordered):
    w, h = problem(64, 256, samples=2000)
    scheme = QuantScheme(4, 64)
    found = hessian_error(w, *gptq(w, h, scheme, activation_order=ordered), h, scheme).sum()
    scale, _ = numerics.choose_qparams(w, scheme)
    plain = hessian_error(w, numerics.quantize(w, scale, None, scheme), scale, None, h, scheme).sum()
    assert found < 0.5 * plain


def test_columns_without_data_are_rounded_plainly_and_bad_hessians_are_said():
    w, h = problem(4, 32)
    h[:, 5] = h[5] = 0.0
    codes, scale, _ = gptq(w, h, QuantScheme(4, -1))
    assert torch.equal(codes[:, 5], numerics.quantize(w, scale, None, QuantScheme(4, -1))[:, 5])
    with pytest.raises(
        mq.WeightError, match=r"its Hessian is not positive with damping=0\.01; calibrate on more samples"
    ):
        gptq(w, -h, QuantScheme(4, -1))

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics import gptq as module
from mono_quant_fx.numerics.clip import search_qparams
from mono_quant_fx.numerics.gptq import best_rows, damped, gptq, hessian_error

#: Two float32 sums of the same terms.
SUM = 1e-4
#: Scales searched on columns that a float32 and a float64 walk have updated.
SEARCH = 1e-3


def problem(n, k, seed=0, samples=200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.5 * torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(samples, k, generator=generator) * torch.rand(k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator), x.T @ x


def eliminate(h, damping, order):
    """Optimal brain quantization's inverse Hessians in turn: at each step the column is eliminated. In float64."""
    h = h.double()
    inverse = torch.linalg.inv(h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64))
    for p in order.tolist():
        yield p, inverse
        inverse = inverse - torch.outer(inverse[:, p], inverse[p]) / inverse[p, p]


def textbook(w, h, scheme, damping, order, scale, zero_point):
    """Optimal brain quantization with its order and scales given: codes, and each column when its turn came."""
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    size = w.shape[1] if scheme.group_size == -1 else scheme.group_size
    work, seen, codes = w.double().clone(), torch.zeros(w.shape), torch.zeros(w.shape)
    for p, inverse in eliminate(h, damping, order):
        s, z = scale[:, p // size].double(), zero_point[:, p // size].double()
        seen[:, p] = work[:, p].float()
        codes[:, p] = (torch.round(work[:, p] / s) + z).clamp(-8, 7)
        error = (work[:, p] - (codes[:, p] - z) * s) / inverse[p, p]
        work -= torch.outer(error, inverse[p])
    return codes.to(torch.int8), seen


def ordered(h, desc_act):
    return torch.argsort(h.diagonal(), descending=True, stable=True) if desc_act else torch.arange(len(h))


GROUPS_AND_ORDERS = [(-1, False), (-1, True), (16, True), (16, False), (32, False)]  # 32 leaves a ragged last group


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "desc_act"), GROUPS_AND_ORDERS)
@pytest.mark.parametrize("block", [8, 128])
def test_it_equals_the_textbook(group, desc_act, symmetric, block, monkeypatch):
    monkeypatch.setattr(module, "B", block)
    scheme = QuantScheme(4, group, symmetric)
    w, h = problem(12, 48)
    order = ordered(h, desc_act)
    codes, scale, zero_point = gptq(w, h, scheme, damping=0.01, desc_act=desc_act)
    expected_scale, expected_zero = search_qparams(w, scheme, h.diagonal())
    assert torch.allclose(scale, expected_scale, rtol=SUM, atol=0.0)
    assert symmetric or torch.equal(zero_point, expected_zero)
    expected, _ = textbook(w, h, scheme, 0.01, order, scale, zero_point)
    better = hessian_error(w, expected, scale, zero_point, h, scheme) <= hessian_error(
        w, affine.quantize(w, scale, zero_point, scheme), scale, zero_point, h, scheme
    )
    assert better.float().mean() > 0.8
    assert torch.equal(codes[better], expected[better])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_a_second_round_searches_the_scales_on_the_updated_columns(desc_act, symmetric):
    scheme = QuantScheme(4, 16, symmetric)
    w, h = problem(12, 48)
    order = ordered(h, desc_act)
    once = gptq(w, h, scheme, desc_act=desc_act)
    twice = gptq(w, h, scheme, desc_act=desc_act, rounds=2)
    assert (hessian_error(w, *twice, h, scheme) <= hessian_error(w, *once, h, scheme)).all()
    _, seen = textbook(w, h, scheme, 0.01, order, *search_qparams(w, scheme, h.diagonal()))
    scale, zero_point = search_qparams(seen, scheme, h.diagonal())
    codes, _ = textbook(w, h, scheme, 0.01, order, scale, zero_point)
    second = hessian_error(w, *twice, h, scheme) < hessian_error(w, *once, h, scheme) * (1 - SUM)
    assert second.any()
    assert torch.equal(twice[0][second], codes[second])
    assert torch.allclose(twice[1][second], scale[second], rtol=SEARCH, atol=0.0)


def test_the_error_of_a_row_is_the_sum_over_columns_of_what_each_step_costs():
    scheme = QuantScheme(4, -1)
    w, h = problem(6, 40)
    scale, _ = search_qparams(w, scheme)
    codes, seen = textbook(w, h, scheme, 0.01, torch.arange(40), scale, None)
    cost = torch.stack([1.0 / inverse[p, p] for p, inverse in eliminate(h, 0.01, torch.arange(40))]).float()
    step = seen - affine.dequantize(codes, scale, None, -1)
    found = hessian_error(w, codes, scale, None, damped(h, 0.01), scheme)
    assert torch.allclose((step**2 * cost).sum(1), found, rtol=SUM)


def test_best_rows_takes_each_row_from_its_best_candidate():
    scheme = QuantScheme(4, 8, False)
    w, h = problem(6, 16)
    fine = gptq(w, h, scheme)
    coarse = (torch.zeros_like(fine[0]), fine[1] * 2, torch.ones_like(fine[2]))
    mixed = [torch.cat([a[:3], b[3:]]) for a, b in zip(fine, coarse, strict=True)]
    rest = [torch.cat([b[:3], a[3:]]) for a, b in zip(fine, coarse, strict=True)]
    for candidates in ((mixed, rest), (rest, mixed)):
        assert all(torch.equal(a, b) for a, b in zip(best_rows(w, h, scheme, *candidates), fine, strict=True))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.integers(1, 6), st.integers(1, 60), st.sampled_from([8, 24, 128, -1]), st.booleans(), st.booleans(),
    st.integers(1, 2), st.integers(0, 999),
)  # fmt: skip
def test_no_row_is_worse_than_plain_rounding_with_the_same_scales(n, k, group, symmetric, desc_act, rounds, seed):
    w, h = problem(n, k, seed, samples=40)
    scheme = QuantScheme(4, group, symmetric)
    codes, scale, zero_point = gptq(w, h, scheme, desc_act=desc_act, rounds=rounds)
    assert int(codes.min()) >= -8 and int(codes.max()) <= 7
    plain = hessian_error(w, affine.quantize(w, scale, zero_point, scheme), scale, zero_point, h, scheme)
    assert (hessian_error(w, codes, scale, zero_point, h, scheme) <= plain * (1 + SUM)).all()


@pytest.mark.parametrize("desc_act", [True, False])
def test_it_is_far_better_than_rounding_where_inputs_are_correlated(desc_act):
    w, h = problem(64, 256, samples=2000)
    scheme = QuantScheme(4, 64)
    found = hessian_error(w, *gptq(w, h, scheme, desc_act=desc_act), h, scheme).sum()
    scale, _ = affine.choose_qparams(w, scheme)
    plain = hessian_error(w, affine.quantize(w, scale, None, scheme), scale, None, h, scheme).sum()
    assert found < 0.5 * plain


def test_columns_without_data_are_rounded_plainly_and_bad_hessians_are_said():
    w, h = problem(4, 32)
    h[:, 5] = h[5] = 0.0
    codes, scale, _ = gptq(w, h, QuantScheme(4, -1))
    assert torch.equal(codes[:, 5], affine.quantize(w, scale, None, QuantScheme(4, -1))[:, 5])
    with pytest.raises(
        mq.WeightError, match=r"its Hessian is not positive with damping=0\.01; calibrate on more samples"
    ):
        gptq(w, -h, QuantScheme(4, -1))

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine, refine
from mono_quant_fx.numerics.gptq import damped, gptq, hessian_error
from tests.test_gptq import SUM, problem

#: A scale of float32 by the closed form, and the bottom of a parabola through three float64 errors.
SCALE = 1e-5
#: What refinement takes off GPTQ's error at the least, on the correlated inputs below.
GAIN = 0.03


def start(w, scheme, h=None):
    if h is not None:
        return gptq(w, h, scheme)
    scale, zero_point = affine.choose_qparams(w, scheme)
    return affine.quantize(w, scale, zero_point, scheme), scale, zero_point


def slow(w, h, scheme, codes, scale, zero_point, sweeps):
    """One row: every code and zero point by trying all sixteen, every scale by the parabola through three errors."""
    size = len(w) if scheme.group_size == -1 else scheme.group_size
    dtype = scale.dtype
    w, h, codes, scale = w.double(), h.double(), codes.tolist(), scale.double().tolist()
    zero = [0] * len(scale) if zero_point is None else zero_point.tolist()

    def error(codes, scale, zero):
        q = torch.tensor([(c - zero[j // size]) * scale[j // size] for j, c in enumerate(codes)], dtype=torch.float64)
        return float((w - q) @ h @ (w - q))

    def changed(values, i, value):
        return [*values[:i], value, *values[i + 1 :]]

    for _ in range(sweeps):
        for g in range(len(scale)):
            for j in range(g * size, min((g + 1) * size, len(w))):
                codes = min(
                    (changed(codes, j, c) for c in sorted(range(-8, 8), key=lambda c: abs(c - codes[j]))),
                    key=lambda tried: error(tried, scale, zero),
                )
            s, step = scale[g], scale[g] / 4
            below, at, above = (error(codes, changed(scale, g, s + d), zero) for d in (-step, 0.0, step))
            bottom = s + step * (below - above) / (2 * (below - 2 * at + above))
            rounded = float(torch.tensor(bottom, dtype=torch.float64).to(dtype))
            scale = changed(scale, g, rounded if abs(rounded - bottom) < abs(s - bottom) else s)
            if not scheme.symmetric:
                zero = min((changed(zero, g, z) for z in range(-8, 8)), key=lambda tried: error(codes, scale, tried))
    return codes, scale, zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [8, 16, -1])  # 16 leaves a ragged last group
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_equals_a_descent_that_tries_everything(symmetric, group, dtype, monkeypatch):
    monkeypatch.setattr(refine, "SWEEPS", 2)
    scheme = QuantScheme(4, group, symmetric)
    w, h = problem(4, 24, seed=3, samples=60)
    w = w.to(dtype)
    codes, scale, zero_point = start(w, scheme)
    found_codes, found_scale, found_zero = refine.refine(w, h, scheme, codes, scale, zero_point)
    assert not torch.equal(found_codes, codes)
    for n in range(4):
        zero = None if zero_point is None else zero_point[n]
        expected_codes, expected_scale, expected_zero = slow(w[n], h, scheme, codes[n], scale[n], zero, 2)
        assert found_codes[n].tolist() == expected_codes
        assert found_scale[n].tolist() == pytest.approx(expected_scale, rel=SCALE)
        assert symmetric or found_zero[n].tolist() == expected_zero


def hessian(kind, k, generator):
    """Few samples are rank-deficient; silent columns are zero rows and columns."""
    if kind == "none":
        return torch.zeros(k, k)
    x = torch.randn({"one": 1, "few": max(1, k // 4), "many": 4 * k, "silent": 4 * k}[kind], k, generator=generator)
    if kind == "silent":
        x[:, :: max(1, k // 8)] = 0.0
    return x.T @ x


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.integers(1, 5), st.integers(1, 200), st.sampled_from([32, 128, -1]), st.booleans(), st.booleans(),
    st.sampled_from(["none", "one", "few", "many", "silent"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 999),
)  # fmt: skip
def test_no_row_grows_worse(n, k, group, symmetric, after_gptq, kind, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(n, k, generator=generator) ** 3).to(dtype)
    h, scheme = hessian(kind, k, generator), QuantScheme(4, group, symmetric)
    before = start(w, scheme, h if after_gptq else None)
    given = [a if a is None else a.clone() for a in before]
    after = refine.refine(w, h, scheme, *before)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before, given, strict=True))
    assert (hessian_error(w, *after, h, scheme) <= hessian_error(w, *before, h, scheme) * (1 + SUM)).all()
    codes, scale, zero_point = after
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, before[1].shape)
    assert int(codes.min()) >= -8 and int(codes.max()) <= 7
    assert bool(torch.isfinite(scale).all()) and bool((scale >= torch.finfo(dtype).tiny).all())
    assert bool(torch.isfinite(affine.dequantize(codes, scale, zero_point, group)).all())
    if symmetric:
        assert zero_point is None
    else:
        assert zero_point.dtype == torch.int8 and int(zero_point.min()) >= -8 and int(zero_point.max()) <= 7


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_improves_gptq_and_is_deterministic(symmetric):
    scheme = QuantScheme(4, 64, symmetric)
    w, h = problem(64, 256, samples=2000)
    before = gptq(w, h, scheme, desc_act=True, rounds=2)
    after = refine.refine(w, damped(h, 0.01), scheme, *before)
    gained = 1 - hessian_error(w, *after, h, scheme).sum() / hessian_error(w, *before, h, scheme).sum()
    assert gained > GAIN
    again = refine.refine(w, damped(h, 0.01), scheme, *before)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(after, again, strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_exact_or_without_data_stays(symmetric):
    scheme = QuantScheme(4, 32, symmetric)
    w, h = problem(8, 70)
    before = start(w, scheme)
    exact = affine.dequantize(*before, 32)
    for weight, matrix in ((exact, h), (w, torch.zeros_like(h))):
        after = refine.refine(weight, matrix, scheme, *before)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(after, before, strict=True))

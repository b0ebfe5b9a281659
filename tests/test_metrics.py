"""The error figures: exact values, masks and infinities, any split into batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq
from mono_quant_fx.numerics.error import ErrorSum

#: float64 sums taken in another order.
SUM_RTOL = 1e-12
INF, NAN = math.inf, math.nan
law = settings(deadline=None, derandomize=True, max_examples=60)
numbers = st.floats(-1e3, 1e3, width=32)


def summed(reference, approximation, cut=None):
    total = ErrorSum()
    for part in (slice(None, cut), slice(cut, None)) if cut is not None else (slice(None),):
        total.add(reference[part], approximation[part])
    return total


def test_known_values():
    reference, approximation = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert mq.sqnr_db(reference, approximation) == pytest.approx(10 * math.log10(25 / 0.25), rel=1e-15)
    assert mq.max_abs_error(reference, approximation) == 0.5
    assert mq.relative_error(reference, approximation) == pytest.approx(0.1, rel=1e-15)


@law
@given(values=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40))
def test_the_definitions_in_float64(values):
    reference, approximation = torch.tensor(values).double().T
    signal, noise = reference.square().sum().item(), (reference - approximation).square().sum().item()
    assert mq.max_abs_error(reference, approximation) == pytest.approx(
        (reference - approximation).abs().max().item(), rel=1e-6
    )
    if signal and noise:
        # values are float32, so only the difference is rounded, to 24 bits
        assert mq.sqnr_db(reference, approximation) == pytest.approx(10 * math.log10(signal / noise), abs=1e-5)
        assert mq.relative_error(reference, approximation) == pytest.approx(math.sqrt(noise / signal), rel=1e-6)


@law
@given(n=st.integers(2, 50), cut=st.integers(0, 50), seed=st.integers(0, 2**31))
def test_batches_add_up_to_the_whole(n, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(n, 3, generator=generator)
    approximation = reference + 0.1 * torch.randn(n, 3, generator=generator)
    whole, parts = summed(reference, approximation), summed(reference, approximation, min(cut, n))
    assert parts.signal == pytest.approx(whole.signal, rel=SUM_RTOL)
    assert parts.noise == pytest.approx(whole.noise, rel=SUM_RTOL)
    assert parts.max_abs == whole.max_abs and (whole.batches, parts.batches) == (1, 2)


def test_scaling_both_changes_no_ratio():
    reference, approximation = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.1, -2.2, 2.7])
    assert mq.sqnr_db(8 * reference, 8 * approximation) == mq.sqnr_db(reference, approximation)
    assert mq.relative_error(8 * reference, 8 * approximation) == mq.relative_error(reference, approximation)


@pytest.mark.parametrize(
    ("reference", "approximation", "db", "relative", "max_abs"),
    [
        ([1.0, 2.0], [1.0, 2.0], INF, 0.0, 0.0),
        ([0.0, 0.0], [0.0, 0.0], INF, 0.0, 0.0),
        ([0.0, 0.0], [1.0, 0.0], -INF, INF, 1.0),
        ([3.0, -INF], [3.0, -INF], INF, 0.0, 0.0),  # a mask that both hold
        ([3.0, NAN], [3.0, NAN], INF, 0.0, 0.0),
        ([1.0, -INF, INF, NAN], [0.9, -INF, INF, NAN], 20.0, 0.1, 0.1),  # the finite places still count
        ([1.0, INF], [1.0, -INF], -INF, INF, INF),
        ([1.0, INF], [1.0, 2.0], -INF, INF, INF),
        ([1.0, 2.0], [1.0, INF], -INF, INF, INF),
        ([1.0, 2.0], [1.0, NAN], -INF, INF, INF),
        ([1.0, NAN], [1.0, 2.0], -INF, INF, INF),
        ([1.0, NAN], [1.0, INF], -INF, INF, INF),
        ([], [], INF, 0.0, 0.0),
    ],
)
def test_special_values(reference, approximation, db, relative, max_abs):
    pair = torch.tensor(reference), torch.tensor(approximation)
    assert mq.sqnr_db(*pair) == pytest.approx(db, abs=1e-5)
    assert mq.relative_error(*pair) == pytest.approx(relative, abs=1e-6)
    assert mq.max_abs_error(*pair) == pytest.approx(max_abs, abs=1e-6)


def test_infinite_noise_stays_infinite():
    total = summed(torch.tensor([1.0, 2.0]), torch.tensor([INF, 2.0]))
    total.add(torch.ones(4), torch.ones(4))
    assert (total.sqnr_db, total.max_abs, total.batches) == (-INF, INF, 2)


def test_no_data_is_no_figure():
    assert ErrorSum().sqnr_db is None and ErrorSum().max_abs == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_float_dtype_without_overflow(dtype):
    big = torch.full((1000,), 6e4, dtype=dtype)  # its energy is far outside float16
    step = 0.5 * big
    assert mq.sqnr_db(big, step) == pytest.approx(10 * math.log10(4), rel=1e-9)
    assert mq.max_abs_error(big, step) == float(step[0])


def test_inputs_stay_as_they_are():
    reference, approximation = torch.tensor([1.0, INF], requires_grad=True), torch.tensor([2.0, INF])
    mq.sqnr_db(reference, approximation)
    assert reference.tolist() == [1.0, INF] and approximation.tolist() == [2.0, INF] and reference.grad is None


@pytest.mark.parametrize("metric", [mq.sqnr_db, mq.max_abs_error, mq.relative_error])
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match=r"^shapes differ: \(2,\) and \(1, 2\)$"):
        metric(torch.ones(2), torch.ones(1, 2))

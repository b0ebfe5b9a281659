"""Observers: identity forward, the same range for any split of the data, qparams that cover it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq
from mono_quant_fx.numerics import code_range
from mono_quant_fx.observers import Observer

#: A range end may lie this much (relative) outside the reach of the codes: rounding of the scale.
COVER_RTOL = 1e-6
law = settings(deadline=None, derandomize=True, max_examples=60)
axes, seeds = st.sampled_from([None, 0, 1, -1]), st.integers(0, 2**31)


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, n, generator=generator) * 3 + torch.randn(4, 1, generator=generator)


def seen(*batches, axis=None):
    observer = mq.MinMaxObserver(axis)
    for batch in batches:
        observer(batch)
    return observer


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_forward_is_the_identity_itself(axis):
    x = torch.randn(4, 6, requires_grad=True)
    observer = mq.MinMaxObserver(axis)
    assert observer(x) is x
    assert not observer.min_val.requires_grad and not observer.max_val.requires_grad


def test_the_range_per_tensor_and_per_channel():
    x = torch.tensor([[1.0, -2.0, 5.0], [0.5, 3.0, -7.0]])
    assert seen(x).statistics() == {"min": (-7.0,), "max": (5.0,)}
    assert seen(x, axis=0).statistics() == {"min": (-2.0, -7.0), "max": (5.0, 3.0)}
    expected = {"min": (0.5, -2.0, -7.0), "max": (1.0, 3.0, 5.0)}
    assert seen(x, axis=1).statistics() == seen(x, axis=-1).statistics() == expected
    assert seen(x.expand(3, 2, 3), axis=2).statistics() == expected
    assert seen(x.bfloat16()).min_val.dtype == torch.float32


@law
@given(n=st.integers(2, 30), seed=seeds, cuts=st.lists(st.integers(0, 30), max_size=4), per_channel=st.booleans())
def test_any_split_into_batches_gives_the_same_range(n, seed, cuts, per_channel):
    x, axis = data(n, seed), 0 if per_channel else None
    parts = torch.tensor_split(x, sorted(min(c, n) for c in cuts), dim=1)  # some may be empty
    whole, split = seen(x, axis=axis), seen(*parts, axis=axis)
    assert torch.equal(whole.min_val, split.min_val) and torch.equal(whole.max_val, split.max_val)
    assert torch.equal(whole.max_val, x.amax(1) if per_channel else x.max())


@law
@given(n=st.integers(1, 30), seed=seeds, bits=st.sampled_from([4, 8]), symmetric=st.booleans(), axis=axes)
def test_qparams_cover_the_range_and_hold_zero(n, seed, bits, symmetric, axis):
    observer = seen(data(n, seed), axis=axis)
    scale, zero_point = observer.calculate_qparams(bits, symmetric)
    qmin, qmax = code_range(bits)
    assert scale.shape == zero_point.shape == observer.min_val.shape
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert bool((scale > 0).all() & (zero_point >= qmin).all() & (zero_point <= qmax).all())
    assert not symmetric or not zero_point.any()
    low, high = (qmin - 0.5 - zero_point) * scale, (qmax + 0.5 - zero_point) * scale  # half a step past the end codes
    slack = COVER_RTOL * scale * (qmax - qmin)
    assert bool((observer.min_val >= low - slack).all() & (observer.max_val <= high + slack).all())
    span = torch.maximum(observer.max_val.clamp(min=0), -observer.min_val.clamp(max=0)) * (2 if symmetric else 1)
    assert bool((scale * (qmax - qmin) >= span * (1 - COVER_RTOL)).all())
    assert bool((scale * (qmax - qmin) <= 2 * span * (1 + COVER_RTOL)).all())  # and not a wasteful multiple of it


@pytest.mark.parametrize(
    ("values", "symmetric", "scale", "zero_point"),
    [
        ([0.0, 25.5], False, 0.1, -128),
        ([-25.5, 0.0], False, 0.1, 127),
        ([10.0, 25.5], False, 0.1, -128),  # widened to hold zero
        ([-1.0, 1.55], False, 0.01, -28),
        ([-1.0, 12.75], True, 0.1, 0),
    ],
)
def test_known_qparams(values, symmetric, scale, zero_point):
    got = seen(torch.tensor(values)).calculate_qparams(8, symmetric)
    assert got[0].item() == pytest.approx(scale, rel=1e-6) and got[1].item() == zero_point


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_data_has_a_usable_scale(symmetric):
    scale, zero_point = seen(torch.zeros(5)).calculate_qparams(8, symmetric)
    assert scale.item() == torch.finfo(torch.float32).tiny
    assert zero_point.item() == (0 if symmetric else -128)


@pytest.mark.parametrize("axis", [None, 0])
def test_qparams_of_nothing_are_an_error_before_data_and_after_reset(axis):
    words = r"^calculate_qparams: the observer has seen no data yet; run calibration first$"
    observer = mq.MinMaxObserver(axis)
    observer(torch.empty(4, 0))  # an empty batch is no data
    with pytest.raises(mq.ConfigError, match=words):
        observer.calculate_qparams()
    observer(torch.ones(4, 2))
    observer.calculate_qparams()
    observer.reset()
    with pytest.raises(mq.ConfigError, match=words):
        observer.calculate_qparams()
    observer(-torch.ones(4, 2))
    assert set(observer.statistics()["max"]) == {-1.0}  # nothing of the first data is left


def test_a_copy_goes_its_own_way():
    observer = seen(torch.tensor([1.0, 2.0]))
    deep, shallow = copy.deepcopy(observer), copy.copy(observer)
    shallow._buffers = dict(observer._buffers)  # shares the tensors, as graphs that share state do
    deep(torch.tensor([9.0]))
    shallow(torch.tensor([-9.0]))
    assert observer.statistics() == {"min": (1.0,), "max": (2.0,)}
    assert deep.statistics() == {"min": (1.0,), "max": (9.0,)}
    assert shallow.statistics() == {"min": (-9.0,), "max": (2.0,)}


def test_create_observer_by_name():
    observer = mq.create_observer("minmax", axis=1)
    assert isinstance(observer, mq.MinMaxObserver) and isinstance(observer, Observer) and observer.axis == 1
    assert repr(mq.create_observer()) == "MinMaxObserver(axis=None, min=inf, max=-inf)"
    for name in ("minmx", "MinMax", "", None):
        with pytest.raises(mq.ConfigError, match=f"^observer {name!r} is not known; known: minmax$"):
            mq.create_observer(name)

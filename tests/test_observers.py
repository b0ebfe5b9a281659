"""Observers: identity forward, the same range for any split of the data, qparams that cover it."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq
from mono_quant_fx.calibration.observers import Observer
from mono_quant_fx.numerics.affine import code_range

#: A range end may lie this much (relative) outside the reach of the codes: rounding of the scale.
COVER_RTOL = 1e-6
#: The energy is rounded to float32 at the end.
ENERGY_RTOL = 1e-6
KINDS = ["minmax", "moving_average_minmax", "histogram", "percentile", "energy"]
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


def test_the_moving_average_of_the_batches_extremes():
    batches = [torch.tensor(v) for v in ([-1.0, 2.0], [-3.0, 1.0], [0.5, 6.0])]
    observer = mq.create_observer("moving_average_minmax", averaging_constant=0.25)
    expected = []
    for batch in batches:
        observer(batch)
        expected.append((observer.min_val.item(), observer.max_val.item()))
    assert expected == [(-1.0, 2.0), (-1.5, 1.75), (-1.0, 2.8125)]
    assert observer.statistics() == {"min": (-1.0,), "max": (2.8125,), "batches": (3.0,)}
    assert observer.calculate_qparams(8)[0].item() == pytest.approx(3.8125 / 255)
    last = mq.create_observer("moving_average_minmax", averaging_constant=1, axis=0)
    for batch in batches:
        last(batch)
    assert last.statistics()["max"] == (0.5, 6.0)  # 1 keeps the last batch


def test_a_moving_average_of_the_same_stays_the_same():
    observer, x = mq.create_observer("moving_average_minmax"), torch.tensor([-0.1, 0.3])
    for _ in range(100):
        observer(x)
    assert torch.equal(observer.min_val, x[0]) and torch.equal(observer.max_val, x[1])


def test_the_energy_of_each_input_channel():
    x = torch.randn(5, 7, 3)
    observer = mq.create_observer("energy")
    observer(x)
    observer(2 * x)
    expected = (5 * x.double().square().mean((0, 1)) / 2).float()
    torch.testing.assert_close(observer.energy, expected, rtol=ENERGY_RTOL, atol=0)
    assert observer.statistics() == {"energy": tuple(observer.energy.tolist())}
    whole, conv = mq.create_observer("energy", axis=None), mq.create_observer("energy", axis=1)
    assert whole(x) is conv(x) is x
    assert whole.energy.item() == pytest.approx(x.square().mean().item(), rel=ENERGY_RTOL)
    assert conv.energy.shape == (7,)


def test_energy_does_not_overflow_and_gives_no_qparams():
    observer = mq.create_observer("energy")
    words = "^calculate_qparams: an energy observer measures no range; use minmax or histogram for qparams$"
    with pytest.raises(mq.ConfigError, match=words):
        observer.calculate_qparams()
    assert observer.energy.item() == 0
    for _ in range(3):
        observer(torch.full((4, 2), 1e19))
    assert observer.statistics() == {"energy": pytest.approx((1e38, 1e38), rel=ENERGY_RTOL)}
    with pytest.raises(mq.ConfigError, match=words):
        observer.calculate_qparams(4, symmetric=True)


def test_create_observer_by_name():
    observer = mq.create_observer("minmax", axis=1)
    assert isinstance(observer, mq.MinMaxObserver) and isinstance(observer, Observer) and observer.axis == 1
    assert repr(mq.create_observer()) == "MinMaxObserver(axis=None, min=inf, max=-inf)"
    moving = mq.create_observer("moving_average_minmax", averaging_constant=0.5)
    assert repr(moving) == "MovingAverageMinMaxObserver(axis=None, averaging_constant=0.5, min=inf, max=-inf)"
    assert repr(mq.create_observer("energy")) == "InputEnergyObserver(axis=-1)"
    for name in KINDS:
        assert mq.create_observer(name).name == name


@pytest.mark.parametrize("name", ["minmx", "MinMax", "", None, ["minmax"]])
def test_an_unknown_observer_is_answered_with_the_known_ones(name):
    known = "minmax, moving_average_minmax, histogram, percentile, energy, auto"
    with pytest.raises(mq.ConfigError, match=f"^observer {re.escape(repr(name))} is not known; known: {known}$"):
        mq.create_observer(name)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("minmax", {"bins": 8}, r"^observer 'minmax' does not take 'bins'; it takes: axis$"),
        ("percentile", {"bin": 8}, r"^observer 'percentile' does not take 'bin'; it takes: axis, percentile, bins$"),
        ("minmax", {"axis": 0.5}, r"^axis=0.5: a dimension such as 0 or -1 is needed, or None for the whole tensor$"),
        ("minmax", {"axis": True}, r"^axis=True: a dimension"),
        (
            "moving_average_minmax",
            {"averaging_constant": 0},
            r"^averaging_constant=0: it must lie in \(0, 1\]; 1 keeps",
        ),
        ("moving_average_minmax", {"averaging_constant": 1.1}, r"^averaging_constant=1.1: it must lie in"),
        (
            "moving_average_minmax",
            {"averaging_constant": "1"},
            r"^averaging_constant='1': a number in \(0, 1\] is needed$",
        ),
        ("moving_average_minmax", {"averaging_constant": float("nan")}, r"^averaging_constant=nan: it must lie in"),
        ("histogram", {"bins": 1}, r"^bins=1: a whole number from 2 to 65536 is needed; 2048 is usual$"),
        ("histogram", {"bins": 2.0}, r"^bins=2.0: a whole number"),
        ("histogram", {"max_cut": -1}, r"^max_cut=-1: a percentage in \[0, 100\] is needed; 0.01 is usual$"),
        ("histogram", {"max_cut": True}, r"^max_cut=True: a percentage"),
        ("percentile", {"percentile": 0}, r"^percentile=0: a number in \(0, 100\] is needed; 99.99 is usual$"),
        ("percentile", {"percentile": 100.1}, r"^percentile=100.1: a number"),
    ],
)
def test_an_option_that_breaks_a_rule_is_answered_with_the_rule(name, options, words):
    with pytest.raises(mq.ConfigError, match=words):
        mq.create_observer(name, **options)

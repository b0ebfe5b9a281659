"""What holds for every kind of observer: splits, merges, saved state, copies, dtypes, and refusals."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq

#: Where an observer averages: sums of float64 in another order, and averages of float32 of another association.
SUM_RTOL, AVERAGE_RTOL = 1e-12, 1e-5
KINDS = ["minmax", "moving_average_minmax", "histogram", "percentile", "energy"]
RANGES = KINDS[:-1]
TOLERANCE = {"energy": SUM_RTOL, "moving_average_minmax": AVERAGE_RTOL}
law = settings(deadline=None, derandomize=True, max_examples=40)
axes = st.sampled_from([None, 0, 1])
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, axis=None):
    return mq.create_observer(kind, axis=axis, **({"bins": 64} if kind in ("histogram", "percentile") else {}))


def seen(kind, batches, axis=None):
    observer = make(kind, axis)
    for batch in batches:
        observer(batch)
    return observer


def state_of(observer):
    return {name: tensor.clone() for name, tensor in observer.state_dict().items()}


def assert_same(a, b, rtol=0.0):
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")


def batches_of(seed, sizes):
    """Batches [3, 4, n] whose scales span twelve powers of two, so that grids grow."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, n, generator=generator) * 2.0 ** (5 - 3 * (i % 5)) for i, n in enumerate(sizes)]


sizes = st.lists(st.integers(0, 5), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("kind", ["minmax", "histogram", "percentile", "energy"])
@law
@given(seed=seeds, sizes=sizes, axis=axes, backwards=st.booleans())
def test_any_split_and_order_of_the_data_gives_the_same_state(kind, seed, sizes, axis, backwards):
    batches = batches_of(seed, sizes)
    split = seen(kind, batches[::-1] if backwards else batches, axis)
    whole = seen(kind, [torch.cat(batches, 2)], axis)
    if sum(sizes):
        assert_same(split, whole, TOLERANCE.get(kind, 0.0))
        assert split.count.sum() == 12 * sum(sizes)


@every_kind
@law
@given(seed=seeds, sizes=sizes, axis=axes, cut=st.integers(0, 5))
def test_merging_is_observing_both(kind, seed, sizes, axis, cut):
    batches = batches_of(seed, sizes)
    first, second = seen(kind, batches[:cut], axis), seen(kind, batches[cut:], axis)
    before = state_of(second)
    assert first.merge(second) is None
    both = seen(kind, batches, axis)
    assert_same(first, both, TOLERANCE.get(kind, 0.0))
    assert_same(second, before)
    first(torch.full((3, 4, 2), 1e4))
    assert_same(second, before)  # and they stay independent


@every_kind
@pytest.mark.parametrize("axis", [None, 0])
def test_a_saved_state_goes_on_in_a_fresh_observer(kind, axis):
    batches = batches_of(1, [3, 2, 4])
    saved = seen(kind, batches[:2], axis)
    loaded = make(kind, axis)
    assert str(loaded.load_state_dict(saved.state_dict())) == "<All keys matched successfully>"
    assert_same(loaded, saved)
    before = state_of(saved)
    loaded(batches[2])
    assert_same(loaded, seen(kind, batches, axis))
    assert_same(saved, before)
    loaded.load_state_dict(make(kind, axis).state_dict())  # the state of nothing as well
    assert_same(loaded, make(kind, axis))


def test_a_saved_state_that_does_not_fit_is_refused():
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="count: the saved state is one a channel, and this observer has axis=None"):
        make("minmax").load_state_dict(seen("minmax", [x], 0).state_dict())
    with pytest.raises(RuntimeError, match="is one observer for the whole tensor, and this observer has axis=0"):
        make("minmax", 0).load_state_dict(seen("minmax", [x]).state_dict())
    with pytest.raises(RuntimeError, match="counts: the saved state has 64 bins, this observer 32"):
        mq.create_observer("histogram", bins=32).load_state_dict(seen("histogram", [x]).state_dict())


@every_kind
def test_a_copy_that_shares_tensors_stays_independent(kind):
    observer = seen(kind, batches_of(2, [3, 3]))
    before, shallow = state_of(observer), copy.copy(observer)
    shallow._buffers = dict(observer._buffers)
    shallow(torch.tensor([1e6, -1e6]))
    assert_same(observer, before)


@every_kind
@pytest.mark.parametrize("axis", [None, 1])
def test_reset_forgets_everything(kind, axis):
    observer = seen(kind, batches_of(3, [2, 2]), axis)
    observer.reset()
    assert_same(observer, make(kind, axis))
    observer(torch.ones(1, 7))  # another number of channels is fine now
    assert_same(observer, seen(kind, [torch.ones(1, 7)], axis))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_observed_as_float32(kind, dtype):
    x = torch.randn(3, 4).to(dtype).requires_grad_()
    observer = make(kind)
    assert observer(x) is x
    assert_same(observer, seen(kind, [x.detach().float()]))
    assert not any(b.requires_grad for b in observer.buffers())


@every_kind
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_and_leave_no_trace(kind, axis, bad):
    observer = seen(kind, [torch.randn(2, 3)], axis)
    before, x = state_of(observer), torch.ones(2, 3)
    x[1, 1] = bad
    with pytest.raises(mq.CalibrationError, match=r"^observer saw NaN or infinity: 1 of 6 values, in float32$"):
        observer(x)
    assert_same(observer, before)


@every_kind
def test_channels_that_change_are_refused(kind):
    observer = seen(kind, [torch.randn(2, 3)], 0)
    for rows in (1, 4):
        words = f"^observer saw {rows} channels along axis 0, and 2 before$"
        with pytest.raises(mq.CalibrationError, match=words):
            observer(torch.randn(rows, 3))
    with pytest.raises(mq.CalibrationError, match=r"^observer of axis 2 saw a tensor of shape \[2, 3\]$"):
        make(kind, 2)(torch.randn(2, 3))
    assert make(kind, 0)(torch.arange(3.0)).shape == (3,)


@every_kind
def test_merge_refuses_what_differs(kind):
    x = torch.randn(2, 3)
    other = KINDS[KINDS.index(kind) - 1]
    mine, theirs = type(make(kind)).__name__, type(make(other)).__name__
    with pytest.raises(mq.ConfigError, match=f"^merge: {mine} cannot take in {theirs}; use the same kind$"):
        make(kind).merge(make(other))
    with pytest.raises(mq.ConfigError, match=r"^merge: axis differs, 0 and 1; use the same options$"):
        make(kind, 0).merge(make(kind, 1))
    with pytest.raises(mq.ConfigError, match=r"^merge: channels differ, 2 and 3$"):
        seen(kind, [x], 0).merge(seen(kind, [x.T], 0))


@pytest.mark.parametrize(
    ("kind", "option", "values"),
    [
        ("histogram", "bins", (64, 32)),
        ("percentile", "percentile", (99.0, 98.0)),
        ("moving_average_minmax", "averaging_constant", (0.5, 0.25)),
    ],
)
def test_merge_refuses_other_options(kind, option, values):
    a, b = (mq.create_observer(kind, **{option: value}) for value in values)
    words = re.escape(f"merge: {option} differs, {values[0]!r} and {values[1]!r}; use the same options")
    with pytest.raises(mq.ConfigError, match=f"^{words}$"):
        a.merge(b)


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("axis", [None, 0])
def test_qparams_before_any_data_are_an_error(kind, axis):
    with pytest.raises(mq.ConfigError, match=r"^calculate_qparams: the observer has seen no data yet; run calibration"):
        make(kind, axis).calculate_qparams()
    assert make(kind, axis).statistics().keys() == seen(kind, [torch.ones(2)], axis).statistics().keys()

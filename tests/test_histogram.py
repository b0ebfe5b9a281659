"""The histogram and what is cut from it: exact counts, KL divergence against plain Python, percentiles, odd ranges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq
from mono_quant_fx.calibration.kl_divergence import TIE, kl_bounds

#: Divergences of the vectorized search and of plain Python differ by rounding; far below TIE.
DIVERGENCE_ATOL = 1e-11
law = settings(deadline=None, derandomize=True, max_examples=80)
seeds = st.integers(0, 2**31)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
histograms = st.lists(st.sampled_from([0, 0, 1, 2, 3, 7, 20, 150]), min_size=4, max_size=24).filter(any)


def seen(*batches, kind="histogram", **options):
    observer = mq.create_observer(kind, **options)
    for batch in batches:
        observer(torch.as_tensor(batch))
    return observer


def edges(observer):
    """The histogram as [(low edge, high edge, count)], exact in Python's floats."""
    width, origin = observer.width.item(), observer.origin.item()
    return [((origin + i) * width, (origin + i + 1) * width, n) for i, n in enumerate(observer.counts.tolist())]


@law
@given(
    values=st.lists(floats, min_size=1, max_size=20), bins=st.sampled_from([2, 3, 16, 31, 2048]), cut=st.integers(0, 20)
)
def test_every_value_is_counted_in_the_bin_that_holds_it(values, bins, cut):
    observer = seen(torch.tensor(values[:cut]), torch.tensor(values[cut:]), bins=bins)
    x = torch.tensor(values).double().tolist()
    table = edges(observer)
    assert [n for _, _, n in table] == [sum(low <= v < high for v in x) for low, high, _ in table]
    assert observer.counts.sum() == observer.count == len(x) and observer.zeros == x.count(0.0)
    finest = observer.exponent == -149
    span = max(*x, 0.0) - min(*x, 0.0)
    assert finest or bins < 4 or (span <= observer.width * bins and observer.width <= 2 * span / (bins - 2))


def test_growth_merges_whole_bins():
    observer = seen([-1.0, 0.25, 0.5, 1.0, 1.5], bins=16)
    assert edges(observer)[:3] == [(-1.0, -0.75, 1), (-0.75, -0.5, 0), (-0.5, -0.25, 0)]
    observer(torch.tensor([100.0]))
    assert [(low, n) for low, _, n in edges(observer) if n] == [(-8.0, 1), (0.0, 4), (96.0, 1)]


def test_one_histogram_a_channel():
    x = torch.stack([torch.linspace(-1, 1, 50), torch.linspace(0, 1000, 50), torch.zeros(50)])
    each = seen(x[:, :20], x[:, 20:], axis=0, bins=64)
    alone = [seen(row, bins=64) for row in x]
    for name in ("counts", "exponent", "origin", "zeros", "count"):
        assert torch.equal(getattr(each, name), torch.stack([getattr(a, name) for a in alone]))
    for symmetric in (False, True):
        expected = [torch.stack(p) for p in zip(*(a.calculate_qparams(4, symmetric) for a in alone), strict=True)]
        assert all(map(torch.equal, each.calculate_qparams(4, symmetric), expected))


def divergence(counts, levels, lo, hi):
    """KL(P || Q) of keeping bins [lo, hi), in plain Python."""
    n, below, above = hi - lo, sum(counts[:lo]), sum(counts[hi:])
    p, q = list(counts[lo:hi]), list(counts[lo:hi])
    if not any(p):
        return math.inf
    q[0] = q[0] or int(below > 0)
    q[-1] = q[-1] or int(above > 0)
    p[0] += below
    p[-1] += above
    spread = [0.0] * n
    for step in range(levels):
        members = [i for i in range(n) if i * levels // n == step and q[i]]
        for i in members:
            spread[i] = sum(q[j] for j in members) / len(members)
    return sum(a / sum(p) * math.log(a / sum(p) / (b / sum(spread))) for a, b in zip(p, spread, strict=True) if a)


def slow_bounds(counts, levels, zero):
    """kl_bounds, one candidate after the other."""
    lo = min(zero, next(i for i, n in enumerate(counts) if n))
    hi = max(zero, len(counts) - next(i for i, n in enumerate(reversed(counts)) if n))
    best = divergence(counts, levels, lo, hi) if hi - lo >= levels else -math.inf
    while True:
        moves = [(lo, up) for up in range(max(zero, lo + levels), hi + 1)]
        moves += [(down, hi) for down in range(lo, min(zero, hi - levels) + 1)]
        found = {move: divergence(counts, levels, *move) for move in moves}
        least = min(found.values(), default=math.inf)
        if least >= best - TIE:
            return lo, hi
        lo, hi = max((m for m in moves if found[m] <= least + TIE), key=lambda m: m[1] - m[0])
        best = least


@law
@given(counts=histograms, levels=st.sampled_from([2, 3, 4, 8]), zero=st.integers(0, 24))
def test_the_kl_bounds_equal_a_slow_reference(counts, levels, zero):
    zero = min(zero, len(counts))
    got = kl_bounds(torch.tensor(counts), levels, zero)
    expected = slow_bounds(counts, levels, zero)
    if got != expected:  # two moves of equal gain and width: rounding may choose either
        a, b = (divergence(counts, levels, *bounds) for bounds in (got, expected))
        assert abs(a - b) <= TIE + DIVERGENCE_ATOL


@law
@given(counts=histograms, levels=st.sampled_from([2, 4]))
def test_with_one_end_fixed_the_minimum_is_global_and_the_widest(counts, levels):
    _, hi = kl_bounds(torch.tensor(counts), levels, 0)
    last = max(i for i, n in enumerate(counts) if n) + 1
    if last < levels:
        assert hi == last
        return
    found = {up: divergence(counts, levels, 0, up) for up in range(levels, last + 1)}
    assert found[hi] <= min(found.values()) + 2 * TIE
    assert all(found[up] > found[hi] - TIE for up in range(hi + 1, last + 1))


def test_the_example_of_the_talk():
    """P = [1 0 2 3 5 3 1 7] in two steps: Q is [2 0 2 2 4 4 4 4]."""
    p, q = [1, 0, 2, 3, 5, 3, 1, 7], [2, 0, 2, 2, 4, 4, 4, 4]
    expected = sum(a / 22 * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
    assert divergence(p, 2, 0, 8) == pytest.approx(expected, abs=DIVERGENCE_ATOL)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_long_tail_is_cut_and_a_flat_histogram_is_not(bits):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=generator)
    tail = torch.cat([normal, torch.tensor([20.0, -20.0])])
    for symmetric in (True, False):
        low, high = seen(tail).value_range(bits, symmetric)
        assert -6 < low < -2 and 2 < high < 6
        flat = torch.linspace(-1, 1, 1 << 16)
        assert seen(flat).value_range(bits, symmetric) == (-1.0, 1.0)


def test_zeros_do_not_draw_the_range_in():
    x = torch.randn(50_000).abs() + 0.01
    spike = torch.zeros(500_000)
    assert seen(x, spike).value_range(8) == seen(x).value_range(8)
    assert seen(x, spike).value_range(8, True) == seen(x).value_range(8, True)


ODD = {
    "zero": [0.0] * 5,
    "constant": [3.3] * 9,
    "negative constant": [-3.3] * 9,
    "one value": [1e-3],
    "the smallest float": [1.4e-45, -1.4e-45, 0.0],
    "subnormal": [1e-40, 2e-40, -1e-41],
    "the largest floats": [3.4028235e38, -3.4028235e38, 1.0],
    "narrow, far from zero": [1000.0, 1000.5, 1001.0],
    "two values": [1.0, 5.0] * 100,
}


def test_the_divergence_cuts_no_more_values_than_it_may():
    torch.manual_seed(0)
    x = torch.softmax(3 * torch.randn(500, 128), -1)  # most values are small, and the few large ones matter
    assert seen(x, max_cut=100).value_range(8)[1] < 0.2
    for max_cut in (0.01, 0.1, 1):
        high = seen(x, max_cut=max_cut).value_range(8)[1]
        assert (x > high).sum() <= math.ceil(max_cut / 100 * x.numel())
    assert mq.create_observer("histogram").max_cut == 0.01
    few = torch.randn(500)
    few[0] = 40.0
    assert seen(few).value_range(8)[1] < 20  # one value may go, however few there are
    assert seen(few, max_cut=0).value_range(8)[1] == 40


@pytest.mark.parametrize("kind", ["histogram", "percentile"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_odd_ranges_are_kept_whole(kind, symmetric, values):
    observer, plain = seen(values, kind=kind), seen(values, kind="minmax")
    for got, expected in zip(
        observer.calculate_qparams(8, symmetric), plain.calculate_qparams(8, symmetric), strict=True
    ):
        assert torch.equal(got, expected)
    assert all(math.isfinite(v) for numbers in observer.statistics().values() for v in numbers)


@pytest.mark.parametrize("far", [1e2, 1e4, 1e30])
def test_one_enormous_outlier_is_counted_and_leaves_usable_qparams(far):
    x = torch.randn(20_000)
    observer = seen(x, [far])
    assert observer.counts.sum() == 20_001 and observer.counts[-1 - observer.counts.flip(0).argmax()] >= 1
    assert observer.max_val == torch.tensor(far)
    for symmetric in (True, False):
        low, high = observer.value_range(8, symmetric)
        assert low <= 0 < high <= torch.tensor(far)
        scale, zero_point = observer.calculate_qparams(8, symmetric)
        assert torch.isfinite(scale) and scale > 0 and -128 <= zero_point <= 127
    assert seen(x, [1e2]).value_range(8, True)[1] <= 25  # a quarter of the range, or less
    assert seen(x, [1e4], bins=1 << 16).value_range(8, True)[1] <= 80  # more bins cut closer


@law
@given(
    seed=seeds, n=st.integers(1, 400), percentile=st.sampled_from([50, 90, 99.0, 99.9, 100]), symmetric=st.booleans()
)
def test_the_percentile_is_that_of_sorting_up_to_one_bin(seed, n, percentile, symmetric):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).pow(3)
    observer = seen(*x.split(7), kind="percentile", percentile=percentile)
    low, high = observer.value_range(8, symmetric)
    share = {50: 500, 90: 100, 99.0: 10, 99.9: 1, 100: 0}[percentile]  # of a thousand
    width = observer.width.item()
    if symmetric:
        last = x.abs().sort().values[n - 1 - n * share // 1000]
        assert low == -high and last <= high <= last + width
    else:
        cut, values = n * share // 2000, x.sort().values
        assert max(values[n - 1 - cut], 0) <= high <= max(values[n - 1 - cut], 0) + width
        assert min(values[cut], 0) - width <= low <= min(values[cut], 0)
    assert int((x > high).sum() + (x < low).sum()) <= n * share / 1000


def test_the_percentile_of_100_is_the_range():
    x = torch.randn(1000)
    assert seen(x, kind="percentile", percentile=100).value_range() == (x.min(), x.max())


def test_statistics_are_those_of_the_values():
    x = torch.distributions.Gamma(2.0, 1.0).sample((100_000,)) - 1
    got = seen(*x.split(30_000)).statistics()
    z = (x.double() - x.double().mean()) / x.double().std(correction=0)
    assert got["count"] == (100_000.0,) and got["min"] == (x.min().item(),) and got["max"] == (x.max().item(),)
    assert got["skew"][0] == pytest.approx(float((z**3).mean()), rel=1e-2)
    assert got["kurtosis"][0] == pytest.approx(float((z**4).mean()), rel=1e-2)
    assert got["outlier_ratio"][0] == pytest.approx(float(x.abs().max() / x.abs().quantile(0.999)), rel=2e-2)
    assert seen().statistics()["outlier_ratio"] == (1.0,)

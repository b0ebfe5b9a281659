"""The layered layout: what every drawing may rely on."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mono_quant_fx.web.layout import BEND, GAP_X, GAP_Y, arrange, place

NUDGE = 1e-6


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 14))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=25)) if pairs else []
    sizes = draw(st.lists(st.tuples(st.floats(20, 200), st.floats(10, 90)), min_size=count, max_size=count))
    return count, [(a, 0, b) for a, b in edges], sizes


@settings(derandomize=True, deadline=None)
@given(graphs())
def test_every_item_stands_once_and_every_link_goes_one_rank_down(case):
    count, edges, _ = case
    found = arrange(count, edges)
    items = [item for rank in found.ranks for item in rank]
    assert sorted(items) == list(range(len(items))) and len(items) >= count
    rank = {item: r for r, inside in enumerate(found.ranks) for item in inside}
    for wire in found.wires:
        assert all(rank[b] == rank[a] + 1 for a, b in wire.links)
    # what the links lead to from each source, through bends, are its edges
    reached = {(w.source, b) for w in found.wires for _, b in w.links if b < count}
    assert reached == {(a, b) for a, _, b in edges}
    for wire in found.wires:
        above = {b: a for a, b in wire.links}
        for item in above:
            while item != wire.source:
                item = above[item]
                assert item == wire.source or item >= count, "a wire passes through a box"


@settings(derandomize=True, deadline=None)
@given(graphs())
def test_no_boxes_overlap(case):
    count, edges, sizes = case
    found = arrange(count, edges)
    placed = place(found, sizes)
    widths = [w for w, _ in sizes] + [BEND] * (len(placed.x) - count)
    for rank in found.ranks:
        for a, b in itertools.pairwise(rank):
            assert placed.x[b] - placed.x[a] >= (widths[a] + widths[b]) / 2 + GAP_X - NUDGE
    for (top, tall), after in zip(zip(placed.tops, placed.heights, strict=True), placed.tops[1:], strict=False):
        assert after == pytest.approx(top + tall + GAP_Y)
    assert min(x - w / 2 for x, w in zip(placed.x, widths, strict=True)) == pytest.approx(0, abs=NUDGE)
    assert max(x + w / 2 for x, w in zip(placed.x, widths, strict=True)) == pytest.approx(placed.width)


def test_first_and_last_are_pinned_and_a_long_wire_is_shared():
    # 0 enters; 1 -> 2 -> 3 a chain; 0 is read by 1, 2 and 3; 4 leaves
    edges = [(0, 0, 1), (0, 0, 2), (0, 0, 3), (1, 0, 2), (2, 0, 3), (1, 0, 4)]
    found = arrange(5, edges, first={0}, last={4})
    assert found.ranks[0] == (0,) and 4 in found.ranks[-1] and 3 not in found.ranks[-1]
    (trunk,) = [w for w in found.wires if w.source == 0]
    assert len(trunk.links) == 5, "two bends for three readers"


def test_a_box_that_reads_nothing_stands_right_above_its_reader():
    assert arrange(4, [(0, 0, 1), (1, 0, 3), (2, 0, 3)]).ranks == ((0,), (1, 2), (3,))


def test_crossings_that_need_not_be_are_avoided():
    found = arrange(6, [(0, 0, 5), (1, 0, 4), (2, 0, 3)])
    first, second = found.ranks
    below = {0: 5, 1: 4, 2: 3}
    assert [below[i] for i in first] == list(second)


def test_a_chain_is_straight_beside_a_long_wire():
    edges = [(i, 0, i + 1) for i in range(6)] + [(0, 1, i) for i in range(2, 7)]
    placed = place(arrange(7, edges), [(100.0, 30.0)] * 7)
    assert max(placed.x[:7]) - min(placed.x[:7]) < 2


def test_nothing_has_no_size():
    placed = place(arrange(0, []), [])
    assert (placed.width, placed.height, placed.x) == (0.0, 0.0, [])

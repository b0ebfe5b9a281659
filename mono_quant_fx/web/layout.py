"""A layered layout of an acyclic graph (Sugiyama's): ranks by longest path, order by barycenter, bends for long edges.

`arrange` needs no sizes, so it is done once; `place` gives coordinates for the sizes that the boxes have just now.
web/draw.js repeats `place` step by step, to move the boxes when one of them opens or closes.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

SWEEPS = 8
GAP_X, GAP_Y, BEND = 14.0, 24.0, 6.0
#: How much rather a bend gives way than a box.
BOX_WEIGHT = 64.0


@dataclass(frozen=True)
class Wire:
    """One value on its way from the box that makes it to all that read it; the links share their bends.

    Attributes:
        source: the box.
        key: which of its values.
        links: (item above, item below), each from one rank to the next.
    """

    source: int
    key: int
    links: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Arrangement:
    """Who stands where, without coordinates.

    Attributes:
        count: how many boxes there are; items from this number on are bends.
        ranks: the items of each rank from left to right.
        wires: in the order of their first edge.
    """

    count: int
    ranks: tuple[tuple[int, ...], ...]
    wires: tuple[Wire, ...]


@dataclass(frozen=True)
class Placement:
    """Coordinates: the center of each item, the top and the height of each rank, and the size of it all."""

    x: list[float]
    tops: list[float]
    heights: list[float]
    width: float
    height: float


def arrange(
    count: int, edges: Sequence[tuple[int, int, int]], first: Collection[int] = (), last: Collection[int] = ()
) -> Arrangement:
    """Ranks and orders `count` boxes.

    Args:
        edges: (source, key, target) with source < target: the boxes come in an order of execution.
        first, last: boxes that stand in the first and in the last rank.

    >>> arrange(3, [(0, 0, 1), (1, 0, 2), (0, 0, 2)]).ranks
    ((0,), (1, 3), (2,))
    """
    rank = _ranks(count, edges, first, last)
    where: list[list[int]] = [[] for _ in range(max(rank, default=-1) + 1)]
    for item in range(count):
        where[rank[item]].append(item)
    targets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for source, key, target in dict.fromkeys(edges):
        targets[source, key].append(target)
    wires, free = [], count
    for (source, key), found in targets.items():
        links, above = [], source
        for level in range(rank[source] + 1, max(rank[t] for t in found) + 1):
            links += [(above, t) for t in found if rank[t] == level]
            if any(rank[t] > level for t in found):
                links.append((above, free))
                where[level].append(free)
                above, free = free, free + 1
        wires.append(Wire(source, key, tuple(links)))
    return Arrangement(count, _ordered(where, [link for wire in wires for link in wire.links]), tuple(wires))


def _ranks(
    count: int, edges: Sequence[tuple[int, int, int]], first: Collection[int], last: Collection[int]
) -> list[int]:
    """The longest path from a source; a box that reads nothing stands right above its first reader."""
    sources: dict[int, list[int]] = defaultdict(list)
    targets: dict[int, list[int]] = defaultdict(list)
    for source, _, target in edges:
        sources[target].append(source)
        targets[source].append(target)
    rank = [0] * count
    for item in range(count):
        rank[item] = max((rank[s] + 1 for s in sources[item]), default=1 if first and item not in first else 0)
    for item in range(count):
        if not sources[item] and targets[item] and item not in first:
            rank[item] = min(rank[t] for t in targets[item]) - 1
    bottom = max((rank[i] + (i not in last) for i in range(count)), default=0)
    return [bottom if item in last else level for item, level in enumerate(rank)]


def _ordered(ranks: list[list[int]], links: list[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Sweeps down and up, each rank sorted by where its neighbours stand; the order with fewest crossings wins."""
    above: dict[int, list[int]] = defaultdict(list)
    below: dict[int, list[int]] = defaultdict(list)
    for a, b in links:
        above[b].append(a)
        below[a].append(b)
    current = [list(items) for items in ranks]
    best, fewest = tuple(map(tuple, current)), _crossings(current, below)
    for sweep in range(SWEEPS):
        if fewest == 0:
            break
        down = sweep % 2 == 0
        steps = range(1, len(current)) if down else range(len(current) - 2, -1, -1)
        for level in steps:
            other = {item: i for i, item in enumerate(current[level - 1 if down else level + 1])}
            _sort_by_neighbours(current[level], above if down else below, other)
        crossings = _crossings(current, below)
        if crossings < fewest:
            best, fewest = tuple(map(tuple, current)), crossings
    return best


def _sort_by_neighbours(items: list[int], neighbours: dict[int, list[int]], other: dict[int, int]) -> None:
    wanted = {}
    for i, item in enumerate(items):
        near = [other[n] for n in neighbours[item]]
        wanted[item] = sum(near) / len(near) if near else float(i)
    items.sort(key=lambda item: wanted[item])


def _crossings(ranks: list[list[int]], below: dict[int, list[int]]) -> int:
    """How many pairs of links cross, counted with a Fenwick tree (Barth, Juenger and Mutzel 2002)."""
    total = 0
    for upper, lower in itertools.pairwise(ranks):
        position = {item: i for i, item in enumerate(lower)}
        tree = [0] * (len(lower) + 1)
        seen = 0
        for item in upper:
            ends = sorted(position[b] for b in below[item])
            for end in ends:
                i, smaller = end + 1, 0
                while i:
                    smaller, i = smaller + tree[i], i & (i - 1)
                total += seen - smaller
            for end in ends:
                i = end + 1
                while i <= len(lower):
                    tree[i], i = tree[i] + 1, i + (i & -i)
            seen += len(ends)
    return total


def place(found: Arrangement, sizes: Sequence[tuple[float, float]]) -> Placement:
    """Coordinates for boxes of these sizes (width, height): no two overlap, and linked ones stand near one another."""
    items = sum(map(len, found.ranks))
    widths = [size[0] for size in sizes] + [BEND] * (items - found.count)
    above: list[list[int]] = [[] for _ in range(items)]
    below: list[list[int]] = [[] for _ in range(items)]
    for wire in found.wires:
        for a, b in wire.links:
            above[b].append(a)
            below[a].append(b)
    above, below = _alike(above, found.count), _alike(below, found.count)
    x = [0.0] * items
    for rank in found.ranks:
        _spread(rank, widths, [0.0] * len(rank), x)
    for sweep in range(SWEEPS):
        near = above if sweep % 2 == 0 else below
        for rank in found.ranks if sweep % 2 == 0 else found.ranks[::-1]:
            wanted = [sum(x[n] for n in near[i]) / len(near[i]) if near[i] else x[i] for i in rank]
            _spread(rank, widths, wanted, x)
    left = min((x[i] - widths[i] / 2 for i in range(items)), default=0.0)
    x = [value - left for value in x]
    heights = [max((sizes[i][1] for i in rank if i < found.count), default=0.0) for rank in found.ranks]
    tops, height = [], 0.0
    for tall in heights:
        tops.append(height)
        height += tall + GAP_Y
    width = max((x[i] + widths[i] / 2 for i in range(items)), default=0.0)
    return Placement(x, tops, heights, width, max(0.0, height - GAP_Y))


def _alike(neighbours: list[list[int]], count: int) -> list[list[int]]:
    """Boxes line up with boxes and bends with bends, where they can: wires stay straight, a chain does not lean."""
    return [[n for n in near if (n < count) == (i < count)] or near for i, near in enumerate(neighbours)]


def _spread(rank: Sequence[int], widths: list[float], wanted: list[float], x: list[float]) -> None:
    """Puts a rank's items as near to `wanted` as their order and widths allow: least squares, by pooling neighbours."""
    offset, offsets = 0.0, []
    for i, item in enumerate(rank):
        if i:
            offset += (widths[rank[i - 1]] + widths[item]) / 2 + GAP_X
        offsets.append(offset)
    pools: list[tuple[float, float, int]] = []  # wanted place times weight, weight, how many items
    for item, want, shift in zip(rank, wanted, offsets, strict=True):
        weight = 1.0 if widths[item] == BEND else BOX_WEIGHT
        total, size = (want - shift) * weight, 1
        while pools and pools[-1][0] / pools[-1][1] > total / weight:
            before = pools.pop()
            total, weight, size = total + before[0], weight + before[1], size + before[2]
        pools.append((total, weight, size))
    centers = [total / weight for total, weight, size in pools for _ in range(size)]
    for item, center, shift in zip(rank, centers, offsets, strict=True):
        x[item] = center + shift

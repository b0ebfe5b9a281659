"""Boxes as SVG: the groups that are open at first are laid out here, the others by web/draw.js on a click."""

from __future__ import annotations

import json
import math
from collections.abc import Collection

from mono_quant_fx.reports.boxes import CHAR, HEAD, LINE, PAD, Box
from mono_quant_fx.web.layout import Placement, Wire, place
from mono_quant_fx.web.page import asset, escape
from mono_quant_fx.web.table import STATUSES


class Canvas:
    """One graph with some of its groups open.

    Args:
        root: the whole graph.
        opened: the groups that are open.
    """

    def __init__(self, root: Box, opened: Collection[Box]):
        self.root = root
        self.opened = set(opened)
        self.placed: dict[Box, Placement] = {}
        self.sizes: dict[Box, tuple[float, float]] = {}
        self._measure(root)

    def svg(self, full: bool) -> str:
        """The picture; `full` adds what is inside closed groups, for the script to show, and no style of its own."""
        width, height = (number(value) for value in self.sizes[self.root])
        style = "" if full else f"<style>{asset('draw.css')}</style>"
        alone = "" if full else ' xmlns="http://www.w3.org/2000/svg" style="color:#222;background:#fff"'
        return (
            f'<svg class="mqfx-graph"{alone} width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
            f"{style}{self._box(self.root, '', full)}</svg>"
        )

    def data(self) -> str:
        """Sizes and arrangement of every box in document order, as JSON of numbers only."""
        order: list[Box] = []
        _list(self.root, order)
        number_of = {box: i for i, box in enumerate(order)}
        return json.dumps([_record(box, number_of) for box in order], separators=(",", ":"))

    def _measure(self, box: Box) -> tuple[float, float]:
        size = box.size
        if box in self.opened:
            sizes = [self._measure(child) for child in box.children]
            placed = self.placed[box] = place(box.inside, sizes)
            size = max(placed.width + 2 * PAD, head_width(box)), placed.height + _head(box) + PAD
        self.sizes[box] = size
        return size

    def _box(self, box: Box, move: str, full: bool) -> str:
        title = f"<title>{escape(box.facts.tip)}</title>" if box.facts is not None else ""
        if box.kind != "group":
            return f'<g class="{_classes(box)}"{move}>{title}{_face(box)}</g>'
        is_open = box in self.opened
        classes = f"{_classes(box)}{' on' if is_open else ''}"
        inside = self._inside(box, full) if is_open or full else ""
        return (
            f'<g class="{classes}" data-k="{escape(box.key)}"{move}><g class="face"><title>{escape(box.key)}</title>'
            f"{_face(box)}</g>{inside}</g>"
        )

    def _inside(self, box: Box, full: bool) -> str:
        placed = self.placed.get(box)
        wires, children = [], []
        if placed is None:
            wires = ["<path/>"] * len(box.inside.wires)
            children = [self._box(child, "", full) for child in box.children]
            width = height = 0.0
        else:
            width, height = self.sizes[box]
            wires = [f'<path d="{self._wire(box, placed, wire)}"/>' for wire in box.inside.wires]
            for i, child in enumerate(box.children):
                x, y = self._corner(box, placed, i)
                children.append(self._box(child, f' transform="translate({number(x)} {number(y)})"', full))
        frame = f'<rect class="bg" width="{number(width)}" height="{number(height)}" rx="6"/>'
        head = f'<text class="head" x="{number(PAD)}" y="16">{escape(headline(box))}</text>' if box.key else ""
        return f'<g class="open">{frame}{head}<g class="w">{"".join(wires)}</g>{"".join(children)}</g>'

    def _left(self, box: Box, placed: Placement) -> float:
        return (self.sizes[box][0] - placed.width) / 2

    def _corner(self, box: Box, placed: Placement, child: int) -> tuple[float, float]:
        rank = next(r for r, items in enumerate(box.inside.ranks) if child in items)
        x = self._left(box, placed) + placed.x[child] - self.sizes[box.children[child]][0] / 2
        return x, _head(box) + placed.tops[rank]

    def _wire(self, box: Box, placed: Placement, wire: Wire) -> str:
        """The path of a wire: curves between ranks, straight lines through them, an arrow at each reader."""
        count, name = box.inside.count, box.names[wire.key]
        rank_of = {item: r for r, items in enumerate(box.inside.ranks) for item in items}
        left, head = self._left(box, placed), _head(box)
        parts = []
        for a, b in wire.links:
            upper, lower = rank_of[a], rank_of[b]
            x1 = left + placed.x[a] + (self._shift(box.children[a], name, "out") if a < count else 0.0)
            x2 = left + placed.x[b] + (self._shift(box.children[b], name, "in") if b < count else 0.0)
            bottom = head + placed.tops[upper] + placed.heights[upper]
            start = head + placed.tops[upper] + self.sizes[box.children[a]][1] if a < count else bottom
            end = head + placed.tops[lower]
            parts.append(_curve(x1, start, bottom, x2, end))
            parts.append(f"V{number(end + placed.heights[lower])}" if b >= count else _arrow(x2, end))
        return "".join(parts)

    def _shift(self, child: Box, name: str, side: str) -> float:
        """How far from a box's middle a value leaves or enters it: an open group has ports."""
        port, placed = child.ports.get((name, side)), self.placed.get(child)
        if port is None or placed is None:
            return 0.0
        return placed.x[port] - placed.width / 2


def number(value: float) -> str:
    """With one decimal at most, rounded as the script does it."""
    return repr(math.floor(value * 10 + 0.5) / 10).removesuffix(".0")


def headline(box: Box) -> str:
    """What stands above an open group."""
    return box.lines[0].replace("▸", "▾") + "".join(f"  {line}" for line in box.lines[1:] if box.change)


def head_width(box: Box) -> float:
    """The least width of an open group, for its headline."""
    return round(len(headline(box)) * CHAR + 2 * PAD, 1) if box.key else 0.0


def _head(box: Box) -> float:
    return HEAD if box.key else PAD


def _curve(x1: float, start: float, bottom: float, x2: float, end: float) -> str:
    move = f"M{number(x1)} {number(start)}V{number(bottom)}" if bottom > start else f"M{number(x1)} {number(start)}"
    if number(x1) == number(x2):
        return f"{move}V{number(end)}"
    middle = number((bottom + end) / 2)
    return f"{move}C{number(x1)} {middle} {number(x2)} {middle} {number(x2)} {number(end)}"


def _arrow(x: float, y: float) -> str:
    return f"M{number(x - 3)} {number(y - 5)}L{number(x)} {number(y)}L{number(x + 3)} {number(y - 5)}"


def _classes(box: Box) -> str:
    names = ["b", box.kind] if box.key or box.kind == "op" else ["b", box.kind, "root"]
    if box.kind == "op" and box.facts is not None:
        names.append("end" if box.facts.op in ("placeholder", "output") else box.facts.tint)
    if box.change:
        names.append(box.change)
    return " ".join(names)


def _face(box: Box) -> str:
    width, height = (number(value) for value in box.size)
    status = min((f.status for f in box.operations() if f.status), key=STATUSES.index, default="")
    strip = f'<rect class="s-{status}" width="4" height="{height}" rx="2"/>' if status else ""
    if box.kind == "port":
        return (
            f'<rect width="{width}" height="{height}" rx="7"/><text x="{number(PAD / 2)}" y="10.5">'
            f"{escape(box.lines[0])}</text>"
        )
    back = f'<rect class="back" x="3" y="3" width="{width}" height="{height}" rx="4"/>' if box.kind == "group" else ""
    texts = "".join(
        f'<text x="{number(PAD)}" y="{number(16 + LINE * i)}"{"" if i else " class=t"}>{escape(line)}</text>'
        for i, line in enumerate(box.lines)
    ).replace(" class=t", ' class="t"')
    return f'{back}<rect width="{width}" height="{height}" rx="4"/>{strip}{texts}'


def _list(box: Box, order: list[Box]) -> None:
    order.append(box)
    for child in box.children:
        _list(child, order)


def _record(box: Box, number_of: dict[Box, int]) -> list[object]:
    """[width, height], and of a group the least width, the height of its head, children, ranks and wires.

    A wire is [source, the source's port or -1, above, below, the lower box's port or -1, above, ...].
    """
    size: list[object] = list(box.size)
    if box.kind != "group":
        return size
    wires = []
    for wire in box.inside.wires:
        name, kids = box.names[wire.key], box.children
        flat = [wire.source, kids[wire.source].ports.get((name, "out"), -1)]
        for a, b in wire.links:
            flat += [a, b, kids[b].ports.get((name, "in"), -1) if b < box.inside.count else -1]
        wires.append(flat)
    children = [number_of[child] for child in box.children]
    return [*size, head_width(box), _head(box), children, box.inside.ranks, wires]

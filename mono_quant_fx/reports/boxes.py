"""The boxes of a drawing: operations in groups by module path, each group with a layered arrangement of its own.

A group is a run of nodes that follow one another, so whatever runs between two calls of a module splits it in two,
and no group can both feed another and read from it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mono_quant_fx.reports.facts import Facts
from mono_quant_fx.web.layout import Arrangement, arrange

#: A group with more boxes than this is cut into runs of at most CHUNK.
CROWD, CHUNK = 60, 40
LONGEST = 30
CHAR, LINE, PAD, HEAD = 6.7, 14.0, 8.0, 24.0


@dataclass(eq=False)
class Box:
    """An operation, a group or a port (where a value enters or leaves an open group).

    Attributes:
        kind: "op", "group" or "port".
        lines: what the box says; of a group, what it says while it is closed.
        key: the group's path, with a number when the path occurs again.
        facts: of an operation.
        children: of a group, in execution order, the ports after the operations.
        ports: of a group, (node whose value passes, "in" or "out") -> which child is its port.
        names: of a group, the node behind each key of the wires inside.
        inside: how the children stand.
        change: in a difference, "add", "del" or "chg".
    """

    kind: str
    lines: tuple[str, ...]
    key: str = ""
    facts: Facts | None = None
    children: list[Box] = field(default_factory=list)
    ports: dict[tuple[str, str], int] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    inside: Arrangement = field(default_factory=lambda: arrange(0, ()))
    change: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of an operation, a port or a closed group."""
        if self.kind == "port":
            return round(CHAR * len(self.lines[0]) * 0.85 + PAD, 1), 14.0
        width = max(map(len, self.lines)) * CHAR + 2 * PAD
        return round(max(width, 56.0), 1), LINE * len(self.lines) + 8.0

    def operations(self) -> Iterator[Facts]:
        """The facts of every operation in it."""
        if self.kind == "op" and self.facts is not None:
            yield self.facts
        for child in self.children:
            yield from child.operations()

    def groups(self) -> Iterator[Box]:
        """Itself and every group in it, outermost first."""
        if self.kind == "group":
            yield self
            for child in self.children:
                yield from child.groups()


def build_tree(facts: Sequence[Facts]) -> Box:
    """The whole graph as one group."""
    seen: Counter[str] = Counter()
    root = _group("", "", _grow(facts, 0, seen), "")
    _connect(root, facts)
    return root


def short(text: str) -> str:
    """At most LONGEST characters, the middle left out."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]}…{text[-half:]}"


def _grow(facts: Sequence[Facts], depth: int, seen: Counter[str]) -> list[Box]:
    """The boxes of a run of nodes whose paths agree up to `depth`."""
    boxes: list[Box] = []
    for path, run in itertools.groupby(facts, lambda f: f.path[: depth + 1] if len(f.path) > depth else None):
        inner = list(run)
        if path is None or len(inner) == 1:
            boxes += [_operation(f, depth) for f in inner]
            continue
        children = _grow(inner, depth + 1, seen)
        if len(children) == 1:
            boxes += children
            continue
        name = ".".join(path)
        seen[name] += 1
        again = f" #{seen[name]}" if seen[name] > 1 else ""
        kinds = dict.fromkeys(f.kind for f in inner if f.path == path)
        boxes.append(_group(name + again, name + again, children, next(iter(kinds), "")))
    return _in_chunks(boxes, facts[0].path[:depth], seen)


def _in_chunks(boxes: list[Box], path: tuple[str, ...], seen: Counter[str]) -> list[Box]:
    while len(boxes) > CROWD:
        count = -(-len(boxes) // CHUNK)
        cuts = [len(boxes) * i // count for i in range(count + 1)]
        chunks = []
        for start, stop in itertools.pairwise(cuts):
            part = boxes[start:stop]
            name = f"{_name(part[0])} … {_name(part[-1])}"
            key = f"{'.'.join(path)}[{name}]"
            seen[key] += 1
            chunks.append(_group(f"{key} #{seen[key]}", name, part, f"{len(part)} boxes"))
        boxes = chunks
    return boxes


def _name(box: Box) -> str:
    return box.key if box.kind == "group" or box.facts is None else box.facts.name


def _operation(facts: Facts, depth: int) -> Box:
    own = ".".join(facts.path[depth:])
    lines = list(dict.fromkeys((short(facts.op.removeprefix(".")), short(own or facts.name))))
    if facts.op == "output":
        lines = ["output"]
    elif facts.op == "placeholder":
        lines = [short(facts.name), "input"]
    figure = "" if facts.figure is None else f"{facts.figure:.1f} dB"
    if facts.scheme or figure:
        lines.append(short("  ".join(part for part in (facts.scheme, figure) if part)))
    return Box("op", tuple(lines), facts=facts)


def _group(key: str, name: str, children: list[Box], kind: str) -> Box:
    box = Box("group", (), key=key, children=children)
    inside = list(box.operations())
    counts = Counter(f.tint for f in inside if f.tint != "other")
    schemes = ", ".join(f"{counts[tint]} {tint}" for tint in ("int4", "int8", "float") if counts[tint])
    nodes = f"{len(inside)} nodes"
    lines = [short(f"▸ {name}"), short(f"{kind}, {nodes}" if kind else nodes)]
    figures = [f.figure for f in inside if f.figure is not None]
    worst = f"worst {min(figures):.1f} dB" if figures else ""
    if schemes or worst:
        lines.append("  ".join(part for part in (schemes, worst) if part))
    box.lines = tuple(lines)
    return box


def _connect(root: Box, facts: Sequence[Facts]) -> None:
    """Draws each edge at every level that it passes: inside the groups it leaves and enters, and between them."""
    chains: dict[str, list[tuple[Box, int]]] = {}
    _find(root, [], chains)
    edges: dict[Box, dict[tuple[int, str, int], None]] = {group: {} for group in root.groups()}
    for reader in facts:
        for name in reader.reads:
            source, target = chains[name], chains[reader.name]
            common = next(i for i, (a, b) in enumerate(zip(source, target, strict=False)) if a != b)
            group = source[common][0]
            edges[group][source[common][1], name, target[common][1]] = None
            for inner, child in source[common + 1 :]:
                edges[inner][child, name, _port(inner, name, "out")] = None
            for inner, child in target[common + 1 :]:
                edges[inner][_port(inner, name, "in"), name, child] = None
    for group, found in edges.items():
        _arrange(group, list(found))


def _find(box: Box, above: list[tuple[Box, int]], chains: dict[str, list[tuple[Box, int]]]) -> None:
    """Each operation's way down: (group, number of the child) from the whole graph to the operation."""
    for i, child in enumerate(box.children):
        way = [*above, (box, i)]
        if child.kind == "op" and child.facts is not None:
            chains[child.facts.name] = way
        else:
            _find(child, way, chains)


def _port(group: Box, name: str, side: str) -> int:
    if (name, side) not in group.ports:
        group.ports[name, side] = len(group.children)
        group.children.append(Box("port", (short(name),), key=side))
    return group.ports[name, side]


def _arrange(group: Box, found: list[tuple[int, str, int]]) -> None:
    """Numbers the values, and the children so that every edge points forward, as `arrange` wants them."""
    entering = {i for (_, side), i in group.ports.items() if side == "in"}
    order = [*sorted(entering), *(i for i in range(len(group.children)) if i not in entering)]
    new = {old: i for i, old in enumerate(order)}
    group.children = [group.children[i] for i in order]
    group.ports = {key: new[i] for key, i in group.ports.items()}
    names: dict[str, int] = {}
    edges = [(new[a], names.setdefault(name, len(names)), new[b]) for a, name, b in found]
    leaving = {i for (_, side), i in group.ports.items() if side == "out"}
    group.names = tuple(names)
    group.inside = arrange(len(group.children), edges, set(range(len(entering))), leaving)

"""Graphs as pictures: boxes in groups by module path, coloured by scheme; two graphs side by side."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.errors import ConfigError
from mono_quant_fx.graph.tensors import need_graph
from mono_quant_fx.graph.text import diff_graphs, format_graph, format_node
from mono_quant_fx.reports.boxes import Box, build_tree
from mono_quant_fx.reports.facts import collect_facts, folded_into
from mono_quant_fx.reports.svg import Canvas
from mono_quant_fx.web.page import Shown, asset, details, escape, frame

MAX_BOXES = 60
SIGNS = {"add": "+", "del": "−", "chg": "~"}


@dataclass(frozen=True)
class Drawing(Shown):
    """A picture of one graph, or of two side by side. Equal graphs give equal bytes; nothing is loaded from elsewhere.

    A notebook shows `html`, where a click on a group opens and closes it; str() is the text form, for a terminal.

    Attributes:
        svg: the picture as a file of its own, as it looks before any click.
        html: the same with what is inside closed groups, and the script that opens them.
        text: format_graph's lines; of a difference, diff_graphs' ("no difference" where there is none).
    """

    svg: str = field(repr=False)
    html: str = field(repr=False)
    text: str = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a page (.html) that a browser opens, or the picture (.svg); an older file is replaced as a whole.

        Raises:
            ConfigError: the name ends in something else.
        """
        target = Path(path)
        if target.suffix not in (".html", ".svg"):
            raise ConfigError(f"Drawing.save({str(target)!r}): the name of a drawing ends in .html or .svg")
        page = (
            '<!DOCTYPE html><html><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            f"<title>mono_quant_fx</title></head><body>{self.html}</body></html>\n"
        )
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(page if target.suffix == ".html" else f"{self.svg}\n", encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def draw(gm: fx.GraphModule, table: AccuracyTable | None = None, *, max_boxes: int = MAX_BOXES) -> Drawing:
    """A picture of a graph: one box an operation, its weight's scheme as colour, modules as groups that open.

    Constants (weights, codes, scales, zero points, biases) are part of the box that reads them; hovering shows the
    node's lines of format_graph, its decision and the reason for it.

    Args:
        gm: any GraphModule, before or after a pass.
        table: the graph's accuracy table, for the dB and the status of each node.
        max_boxes: groups are open at first as deep as no more boxes than this show.

    Raises:
        PreconditionError: `gm` is no GraphModule.
        ConfigError: `table` is no AccuracyTable, or `max_boxes` is less than 1.

    >>> import mono_quant_fx as mq
    >>> from torch import nn
    >>> drawing = draw(mq.capture(nn.Linear(4, 2).eval()))
    >>> drawing.svg[:25], "linear</text>" in drawing.html
    ('<svg class="mqfx-graph" x', True)
    """
    _check("draw", gm, max_boxes)
    if table is not None and not isinstance(table, AccuracyTable):
        raise ConfigError(f"draw: table={table!r:.80}: an AccuracyTable is needed, such as result.accuracy")
    root = build_tree(collect_facts(gm, table))
    canvas = Canvas(root, _opened(root, _depth(root, max_boxes)))
    body = f'{_legend(table is not None)}<div class="scroll">{_side(canvas)}</div>'
    return Drawing(canvas.svg(full=False), _page(body), format_graph(gm))


def draw_diff(before: fx.GraphModule, after: fx.GraphModule, *, max_boxes: int = MAX_BOXES) -> Drawing:
    """Two graphs side by side: what is gone is red, what is new is green, what reads differently is orange.

    Nodes are matched by name. A box counts as changed where its line of format_graph, or that of a constant in it,
    does. A group opens and closes on both sides, and says how many boxes in it are new (+), gone (−) and changed (~).

    Args:
        before, after: the graph that went into a pass, and the one that came out.
        max_boxes: as for draw, for each side.

    Raises:
        PreconditionError: one of them is no GraphModule.
        ConfigError: `max_boxes` is less than 1.
    """
    _check("draw_diff", before, max_boxes)
    _check("draw_diff", after, max_boxes)
    lines = [{n.name: format_node(gm, n) for n in gm.graph.nodes} for gm in (before, after)]
    states = [_states(lines[0], lines[1], "del"), _states(lines[1], lines[0], "add")]
    roots = []
    for gm, state in zip((before, after), states, strict=True):
        roots.append(build_tree(collect_facts(gm)))
        _mark(roots[-1], state | _through_constants(gm, state))
    depth = min(_depth(root, max_boxes) for root in roots)
    canvases = [Canvas(root, _opened(root, depth)) for root in roots]
    sides = [f"<div><b>{name}</b>{_side(c)}</div>" for name, c in zip(("before", "after"), canvases, strict=True)]
    text = diff_graphs(before, after) or "no difference"
    body = (
        f"{_diff_legend(states)}"
        f'<div class="scroll"><div class="mqfx-sides">{"".join(sides)}</div></div>{_as_text(lines[0], lines[1])}'
    )
    return Drawing(_beside(canvases), _page(body), text)


def _check(name: str, gm: object, max_boxes: object) -> None:
    need_graph(gm, name)
    if not isinstance(max_boxes, int) or isinstance(max_boxes, bool) or max_boxes < 1:
        raise ConfigError(f"{name}: max_boxes={max_boxes!r}: a whole number from 1 on is needed")


def _depth(root: Box, max_boxes: int) -> int:
    """How many levels of groups to open so that no more than max_boxes boxes show; the first level always is."""
    depth, level = 1, [child for child in root.children if child.kind != "port"]
    shown = 0
    while any(box.kind == "group" for box in level):
        groups = [box for box in level if box.kind == "group"]
        shown += len(level) - len(groups)
        level = [child for box in groups for child in box.children if child.kind != "port"]
        if shown + len(level) > max_boxes:
            break
        depth += 1
    return depth


def _opened(root: Box, depth: int) -> list[Box]:
    opened, level = [], [root]
    for _ in range(depth):
        opened += level
        level = [child for box in level for child in box.children if child.kind == "group"]
    return opened


def _states(own: dict[str, str], other: dict[str, str], missing: str) -> dict[str, str]:
    """Node -> what became of it, for the nodes that the two graphs do not share as they are."""
    return {n: "chg" if n in other else missing for n, line in own.items() if other.get(n) != line}


def _through_constants(gm: fx.GraphModule, state: dict[str, str]) -> dict[str, str]:
    """Readers of a constant that changed: changed themselves unless they are new or gone."""
    folded = folded_into(gm)
    return {user: state.get(user, "chg") for name, users in folded.items() if name in state for user in users}


def _mark(box: Box, state: dict[str, str]) -> Counter[str]:
    """Sets the change of every box, and gives the counts."""
    counts: Counter[str] = Counter()
    if box.facts is not None:
        box.change = state.get(box.facts.name, "")
        counts[box.change] += 1
    for child in box.children:
        counts += _mark(child, state)
    del counts[""]
    if box.kind == "group" and counts and box.key:
        box.change = next(iter(counts)) if len(counts) == 1 and box.lines and _all(box, counts) else "chg"
        said = " ".join(f"{SIGNS[name]}{counts[name]}" for name in SIGNS if counts[name])
        box.lines = (*box.lines, said)
    return counts


def _all(box: Box, counts: Counter[str]) -> bool:
    return sum(counts.values()) == len(list(box.operations()))


def _side(canvas: Canvas) -> str:
    return f'<div data-tree="{canvas.data()}">{canvas.svg(full=True)}</div>'


def _page(body: str) -> str:
    """The report around a drawing; its id is made of its content, so that two drawings never share one."""
    name = hashlib.sha256(body.encode()).hexdigest()[:12]
    whole = frame(f"<style>{asset('draw.css')}</style>{body}", "draw.js")
    return whole.replace('<div class="mqfx">', f'<div class="mqfx mqfx-draw" id="mqfx-{name}">', 1)


def _chip(color: str, text: str) -> str:
    return f'<span><i style="background:rgba({color},.3);border-color:rgb({color})"></i>{text}</span>'


BUTTONS = '<button data-all="open" hidden>open all</button><button data-all="close" hidden>close all</button>'


def _legend(judged: bool) -> str:
    schemes = _chip("56,132,255", "int4") + _chip("163,92,255", "int8") + _chip("190,145,40", "float weight")
    schemes += _chip("128,128,128", "no weight")
    status = "220,50,47 critical", "226,132,20 warning", "150,165,20 ok", "46,160,67 good"
    bars = "".join(
        f'<span><i style="width:4px;background:rgb({c});border-color:rgb({c})"></i>{name}</span>'
        for c, name in (s.split() for s in status)
    )
    return f'<div class="mqfx-legend">{schemes}{bars if judged else ""}<span>▸ opens</span>{BUTTONS}</div>'


def _diff_legend(states: Sequence[dict[str, str]]) -> str:
    counts = Counter(states[0].values()) + Counter(state for state in states[1].values() if state == "add")
    chips = (
        _chip("220,50,47", f"{counts['del']} gone")
        + _chip("46,160,67", f"{counts['add']} new")
        + _chip("226,132,20", f"{counts['chg']} changed")
    )
    return f'<div class="mqfx-legend">{chips}<span>nodes, constants among them; ▸ opens</span>{BUTTONS}</div>'


def _as_text(before: dict[str, str], after: dict[str, str]) -> str:
    """The difference line by line, folded away."""
    marks = {"+": ' class="add"', "-": ' class="del"'}
    lines = difflib.unified_diff([*before.values()], [*after.values()], n=1, lineterm="")
    shown = [line for line in lines if not line.startswith(("---", "+++"))]
    rows = "\n".join(f"<span{marks.get(line[0], '')}>{escape(line)}</span>" for line in shown)
    return details("as text", f"<pre>{rows or 'no difference'}</pre>")


def _beside(canvases: Sequence[Canvas]) -> str:
    """Two pictures in one file."""
    (left, height), (right, tall) = (canvas.sizes[canvas.root] for canvas in canvases)
    inner = [canvas.svg(full=False) for canvas in canvases]
    second = inner[1].replace("<svg ", f'<svg x="{round(left) + 30}" ', 1)
    size = f'width="{round(left + right) + 40}" height="{round(max(height, tall))}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="background:#fff">{inner[0]}{second}</svg>'

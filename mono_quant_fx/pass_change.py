"""What passes did and what a pipeline holds, as records and for a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mono_quant_fx.web.page import details, escape, frame, grid

#: So many names of nodes are shown at once.
SHOWN = 200


@dataclass(frozen=True)
class PassChange:
    """What one pass did to the nodes of a graph.

    Attributes:
        name: of the pass.
        nodes_before, nodes_after: how many nodes the graph had, and has.
        added, removed: names of nodes that only the graph after, or only the graph before, has.
        changed: names of nodes that both have, with another operation, other arguments or other meta (annotations).
    """

    name: str
    nodes_before: int
    nodes_after: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    @classmethod
    def between(cls, name: str, before: Sequence[tuple[Any, ...]], after: Sequence[tuple[Any, ...]]) -> PassChange:
        """The change from one fingerprint's nodes, (op, name, ...) each, to another's."""
        old, new = ({node[1]: node for node in nodes} for nodes in (before, after))
        return cls(
            name,
            len(before),
            len(after),
            tuple(n for n in new if n not in old),
            tuple(n for n in old if n not in new),
            tuple(n for n, node in new.items() if n in old and old[n] != node),
        )

    @property
    def is_empty(self) -> bool:
        """Whether no node differs (the tensors behind them may)."""
        return not (self.added or self.removed or self.changed)


def result_html(modified: bool, changes: Sequence[PassChange]) -> str:
    """One row a pass: the counts of its nodes, and the names folded away."""
    rows = []
    for change in changes:
        names = [
            details(f"{len(found)} {what}", f"<code>{escape(_listed(found))}</code>") if found else ""
            for what, found in (("new", change.added), ("gone", change.removed), ("changed", change.changed))
        ]
        rows.append([f"<b>{escape(change.name)}</b>", f"{change.nodes_before} → {change.nodes_after}", *names])
    table = grid(("pass", "nodes", "new", "gone", "changed"), rows) if rows else ""
    return frame(f"<p><b>{'modified' if modified else 'not modified'}</b></p>{table}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def result_text(modified: bool, changes: Sequence[PassChange]) -> str:
    """The same for a terminal: one line a pass."""
    lines = ["modified" if modified else "not modified"]
    for change in changes:
        said = ((change.added, "new"), (change.removed, "gone"), (change.changed, "changed"))
        counts = ", ".join(f"{len(found)} {what}" for found, what in said if found) or "no node differs"
        lines.append(f"{change.name}: {change.nodes_before} -> {change.nodes_after} nodes, {counts}")
    return "\n".join(lines)


def pipeline_html(passes: Sequence[Any]) -> str:
    """One row a pass with its options."""
    rows = []
    for i, item in enumerate(passes, 1):
        shown = "<br>".join(f"<code>{escape(option)}</code>" for option in _options(item))
        rows.append([str(i), f"<b>{escape(item.name)}</b>", f"<code>{escape(type(item).__name__)}</code>", shown])
    table = grid(("", "pass", "class", "options"), rows).replace("<table>", '<table class="wide">', 1)
    return frame(table if rows else "<p>no passes</p>")


def pipeline_text(passes: Sequence[Any]) -> str:
    """The same for a terminal: one line a pass."""
    return (
        "\n".join(f"{item.name}: {type(item).__name__}({', '.join(_options(item))})" for item in passes) or "no passes"
    )


def _options(item: Any) -> list[str]:
    fields = dataclasses.fields(item) if dataclasses.is_dataclass(item) else ()
    return [f"{f.name}={option_text(getattr(item, f.name))}" for f in fields]


def option_text(value: object) -> str:
    """A setting in one line: of a dataclass what differs from the defaults, of data how much there is.

    >>> from mono_quant_fx.config import QuantConfig
    >>> option_text(QuantConfig(group_size=64)), option_text([[1], [2]]), option_text("gptq")
    ('QuantConfig(group_size=64)', '2 items', "'gptq'")
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        set_ = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        said = (f"{f.name}={option_text(v)}" for f, v in set_ if f.default is dataclasses.MISSING or v != f.default)
        return f"{type(value).__name__}({', '.join(said)})"
    plain = str | int | float | bool | None
    if isinstance(value, list | tuple) and not all(isinstance(v, plain) for v in value):
        return f"{len(value)} items"
    text = repr(value) if isinstance(value, plain | list | tuple | dict) else f"a {type(value).__name__}"
    return text if len(text) <= 300 else f"{text[:299]}…"

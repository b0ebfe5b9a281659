"""Explanation: what explain returns, as words for a terminal and as HTML for a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass

from mono_quant_fx.graph.provenance import Step
from mono_quant_fx.reports.code_summary import CodeSummary


@dataclass(frozen=True)
class Chapter:
    """The story of one weight, or of one node without a weight.

    Attributes:
        title: the weight's or the node's name.
        facts: (label, text) in the order in which they are told.
        steps: what the passes did to it, and to the ops that read it.
        codes: figures of what is stored; None where nothing was quantized.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    steps: tuple[Step, ...]
    codes: CodeSummary | None = None

    def __str__(self) -> str:
        facts = (*self.facts, *(("passes" if not i else "", str(step)) for i, step in enumerate(self.steps)))
        width = max((len(label) for label, _ in facts), default=0)
        return "\n".join([self.title, *(f"  {label:<{width}}  {text}" for label, text in facts)])

    def to_html(self) -> str:
        """A heading, a table of the facts and a list of the steps; every text is escaped."""
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self.facts)
        steps = "".join(f"<li>{html.escape(str(step))}</li>" for step in self.steps)
        return f"<h4>{html.escape(self.title)}</h4><table>{rows}</table>" + (f"<ol>{steps}</ol>" if steps else "")


@dataclass(frozen=True)
class Explanation:
    """The story behind a name: one chapter a weight, or a node. str() is for a terminal; a notebook shows HTML."""

    name: str
    chapters: tuple[Chapter, ...]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.chapters))

    def _repr_html_(self) -> str:
        return "".join(chapter.to_html() for chapter in self.chapters)

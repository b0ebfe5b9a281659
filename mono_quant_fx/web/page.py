"""Pieces of HTML that the reports share: escaping, style and script files of web/, plain tables."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any


class Shown:
    """What IPython in a terminal shows as str() instead of repr(), and a notebook as HTML."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: object) -> str:
    """Text that is safe between tags and within quotes, in HTML and in XML.

    >>> escape('<b a="1">')
    '&lt;b a=&quot;1&quot;&gt;'
    """
    return html.escape(_NOT_XML.sub("\ufffd", str(text)))


@functools.cache
def asset(name: str) -> str:
    """A file of web/."""
    return (files("mono_quant_fx.web") / name).read_text(encoding="utf-8").strip()


def frame(body: str, script: str = "") -> str:
    """One report: its style, its body, its script (a file of web/; it finds the report as the one right before it)."""
    code = f"<script>{asset(script)}</script>" if script else ""
    return f'<div class="mqfx"><style>{asset("html.css")}</style>{body}</div>{code}'


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the header is text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def details(summary: str, body: str) -> str:
    """Something folded away; both are HTML already."""
    return f"<details><summary>{summary}</summary>{body}</details>"

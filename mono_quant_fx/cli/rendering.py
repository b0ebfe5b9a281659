"""What the command line prints: sections of text and tables, as text, markdown, csv or JSON; safe on any terminal."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tabulate import tabulate

from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.errors import MonoQuantError

PROGRAM = "mono-quant-fx"
FORMATS = ("table", "markdown", "json", "csv")
T = TypeVar("T")


class CommandError(MonoQuantError):
    """A command cannot do what it was asked; the message names the option or file, the rule and the way out."""


@dataclass(frozen=True)
class Grid:
    """A table: a title, columns (a name that starts with ">" is aligned right) and rows of cells."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]

    def render(self, style: str) -> str:
        """In one of tabulate's styles."""
        names = [name.removeprefix(">") for name in self.columns]
        sides = ["right" if name.startswith(">") else "left" for name in self.columns]
        body = [[printable(str(cell)) for cell in row] for row in self.rows]
        return tabulate(body, names, tablefmt=style, colalign=sides if body else None, disable_numparse=True)

    def to_csv(self) -> str:
        """The same cells, one row a line."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([name.removeprefix(">") for name in self.columns])
        writer.writerows([[printable(str(cell)) for cell in row] for row in self.rows])
        return out.getvalue()


Part = str | Grid | AccuracyTable


@dataclass(frozen=True)
class Report:
    """What a command has to say.

    Attributes:
        main: the table that csv prints.
        data: what json prints, one object.
        before, after: what stands around the table as text and markdown; strings are paragraphs.
    """

    main: Grid | AccuracyTable
    data: dict[str, Any]
    before: tuple[Part, ...] = ()
    after: tuple[Part, ...] = field(default=())

    def render(self, style: str) -> str:
        """In one of FORMATS, without the last line's end."""
        if style == "json":
            return json.dumps(plain(self.data), indent=2, allow_nan=False)
        if style == "csv":
            return self.main.to_csv().rstrip("\n")
        parts = (*self.before, self.main, *self.after)
        return "\n\n".join(text for part in parts if (text := _text(part, style == "markdown")))


def _text(part: Part, is_markdown: bool) -> str:
    if isinstance(part, str):
        return "\n".join(map(printable, part.split("\n")))
    if isinstance(part, AccuracyTable):
        return part.to_markdown() if is_markdown else str(part)
    if not part.rows:
        return ""
    body = part.render("github" if is_markdown else "simple")
    if not part.title:
        return body
    return f"## {part.title}\n\n{body}" if is_markdown else f"{part.title}\n\n{body}"


def printable(text: str) -> str:
    r"""The text on one line, whatever is in it: a name in a file must not steer the terminal.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cleaned(value: T) -> T:
    """A frozen dataclass whose strings are printable."""
    texts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
    return dataclasses.replace(value, **{k: printable(v) for k, v in texts.items() if isinstance(v, str)})  # type: ignore[type-var]


def plain(value: Any) -> Any:
    """JSON data: an infinite or undefined figure is a string ("inf", "nan"), as AccuracyTable.to_json has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def size(count: int) -> str:
    """Bytes for a reader.

    >>> size(999), size(1_234_567)
    ('999 bytes', '1.2 MB')
    """
    return f"{count} bytes" if count < 1000 else f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"

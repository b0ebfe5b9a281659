"""Names in a stored graph. torch.fx turns a graph into Python source, so each has to be one that it can write there."""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Container
from typing import Any

from torch import fx, nn

from mono_quant_fx.json_values import need

#: Characters of a name: more than any model has, and no more than Python's parser bears.
_LONGEST = 100_000
#: Modules inside modules.
_DEEPEST = 100
#: Names that the code of a graph uses for something else.
RESERVED = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "slice"})
_IN_ROOT = frozenset({*dir(fx.GraphModule(nn.Module(), fx.Graph())), "_in_spec", "_out_spec"})
_IN_MODULE = frozenset(dir(nn.Module()))


def is_name(name: Any) -> bool:
    """Whether Python takes it as the name of a variable, and as it is spelled.

    >>> is_name("größe"), is_name("class"), is_name("\ufb01x")  # Python reads the last one as "fix"
    (True, False, False)
    """
    plain = isinstance(name, str) and len(name) <= _LONGEST and name.isidentifier() and not keyword.iskeyword(name)
    return plain and unicodedata.normalize("NFKC", name) == name


def _is_part(part: str) -> bool:
    """Whether torch.fx can write it as an attribute: behind a dot, or else in quotation marks."""
    if part.startswith("__") and part.endswith("__"):
        return False
    if part.isidentifier():
        return is_name(part)
    return 0 < len(part) <= _LONGEST and part.isprintable() and not set(part) & set('"\\')


def check_path(path: Any, what: str) -> str:
    """A dotted path whose parts torch.fx can write as attributes, and that no attribute of a module stands in.

    Raises:
        GraphFormatError: it is none.
    """
    parts = path.split(".") if isinstance(path, str) else [""]
    need(
        len(parts) <= _DEEPEST and all(map(_is_part, parts)),
        what,
        path,
        "it is a dotted path of names without quotation marks",
    )
    taken = [p for i, p in enumerate(parts) if p in (_IN_MODULE if i else _IN_ROOT)]
    need(not taken, what, path, f"{taken[0] if taken else ''} is an attribute that every module has")
    return str(path)


def above(path: str, known: Container[str]) -> str:
    """The path of `known` that a path lies in; "" for none."""
    parts = path.split(".")
    return next((p for i in range(1, len(parts)) if (p := ".".join(parts[:i])) in known), "")

"""Every field of QuantConfig as an option: its type from the annotation, its help from the docstring."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from mono_quant_fx.config import QuantConfig

#: Metavariables of what takes several values.
_LISTS = {"skip_layer_types": "TYPE", "layer_types": "TYPE"}


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds --bits and the like; a field that is not given stays out of the parsed options (see config_fields)."""
    group = parser.add_argument_group("settings", "each is a field of QuantConfig; docs/skipping.md explains them")
    hints, helps = typing.get_type_hints(QuantConfig), field_helps()
    for field in dataclasses.fields(QuantConfig):
        names = [f"--{field.name.replace('_', '-')}"]
        if field.name == "modules_to_not_convert":
            names.insert(0, "--skip")
        given: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": helps.get(field.name, "")}
        group.add_argument(*names, **given, **_kind(field.name, hints[field.name]))


def config_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, as keywords of QuantConfig."""
    names = {field.name for field in dataclasses.fields(QuantConfig)}
    return {name: value for name, value in vars(options).items() if name in names}


def field_helps() -> dict[str, str]:
    """Field -> what the docstring says about it, on one line and with argparse's percent signs doubled.

    >>> field_helps()["bits"]
    '4 or 8 for the weights that no rule singles out.'
    """
    text = inspect.getdoc(QuantConfig) or ""
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text.partition("Args:")[2].partition("Raises:")[0], re.M)
    return {name: " ".join(words.split()).replace("``", "").replace("%", "%%") for name, words in found}


def _kind(name: str, hint: Any) -> dict[str, Any]:
    """The keywords of add_argument for a field of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint in (int, float, int | None):
        return {"type": float if hint is float else int, "metavar": "X" if hint is float else "N"}
    if name == "overrides":
        return {"type": _override, "nargs": "+", "action": "extend", "metavar": "PATTERN=SCHEME"}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "action": "extend", "metavar": _LISTS.get(name, "NAME")}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {"type": _or_none, "metavar": "VALUE"}
    return {"metavar": "VALUE"}


def _override(text: str) -> tuple[str, str]:
    pattern, equals, scheme = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=SCHEME, e.g. lm_head=int8 or 'mlp=int4 g32 asym'")
    return pattern, scheme


def _or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text

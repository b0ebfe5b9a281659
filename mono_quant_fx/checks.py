"""Checks of settings, with one wording each: every message begins with the field and its value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from mono_quant_fx.errors import ConfigError


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raises ConfigError("name=value: rule") unless `ok`."""
    if not ok:
        raise ConfigError(f"{name}={value!r}: {rule}")


def choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """The value is one of those allowed."""
    require(value in allowed, name, value, "one of " + ", ".join(map(repr, allowed)) + " is needed")


def whole(name: str, value: object, least: int) -> None:
    """A whole number of at least `least`; True and False are none."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, name, value, f"a whole number >= {least} is needed")


def items(name: str, value: Any) -> tuple[Any, ...]:
    """A list's items; None is an empty list, and a bare string is an error."""
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ConfigError(f"{name}={value!r}: a list is needed; write {name}=[{value!r}]")
    return tuple(value)


def check_pattern(name: str, pattern: object) -> str:
    """A name, or "re:" and a valid regular expression."""
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{name}: {pattern!r} is no pattern; a name or 're:...' is needed")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as e:
            raise ConfigError(f"{name}: {pattern!r} is no regular expression: {e}") from e
    return pattern


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """A list of such patterns."""
    return tuple(check_pattern(name, item) for item in items(name, value))


def type_names(name: str, value: Any) -> tuple[str, ...]:
    """Class names, from classes or names."""
    if isinstance(value, type):
        raise ConfigError(f"{name}={value.__name__}: a list is needed; write [{value.__name__}]")
    return tuple(item.__name__ if isinstance(item, type) else check_pattern(name, item) for item in items(name, value))


def positive(name: str, value: object) -> None:
    """A finite number above 0."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    require(ok, name, value, "a finite number above 0 is needed")


def flag(name: str, value: object) -> None:
    """True or False, nothing that merely counts as such."""
    require(isinstance(value, bool), name, value, "True or False")

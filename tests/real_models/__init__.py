"""Models with weights that people use, each with a loader and a figure that says whether it still does its job."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def package_folder(name: str, install: str) -> Path:
    """Where a package that carries weights lies; it is found without being imported, so its dependencies may be absent.

    A test that needs a missing package is skipped, and fails where the environment variable CI is set.
    """
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    message = f"{name} is missing: {install}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)

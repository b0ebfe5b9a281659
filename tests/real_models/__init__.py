"""Models with weights that people use, each with data and a figure that says whether it still does its job.

minilm, smollm2, effnet_lite0 and g2p_gru are modules with the same names in them:

    NAME, METRIC: str               what the figure is called; HIGHER_IS_BETTER: bool
    load() -> nn.Module             the float model in eval mode
    calibration() -> batches        a list of argument tuples, the same at each call, disjoint from what evaluate reads
    unseen() -> batches             likewise, of data that calibration() does not have: what outputs are measured on
    NUM_SAMPLES: int                the num_calibration_samples that takes all of them
    evaluate(model) -> (metric, standard error or None)    deterministic, batched, without gradients

Weights and data come from packages; what is missing skips a test, and fails it where CI is set.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NoReturn

import pytest

DATA = Path(__file__).parent / "data"


def missing(what: str, remedy: str) -> NoReturn:
    """Skips a test that cannot get `what`, and fails it where the environment variable CI is set."""
    message = f"{what} is missing: {remedy}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def package_folder(name: str, install: str) -> Path:
    """Where a package that carries weights lies; it is found without being imported, so its dependencies may be absent.

    A test that needs a missing package is skipped, and fails where the environment variable CI is set.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        missing(name, install)
    return Path(spec.origin).parent


def data_lines(file: str) -> list[str]:
    """The lines of a file in data/ without its comments, which say where it comes from."""
    return [line for line in (DATA / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def share(hits: int, asked: int) -> tuple[float, float]:
    """hits / asked and its standard error, sqrt(p (1 - p) / n)."""
    p = hits / asked
    return p, (p * (1 - p) / asked) ** 0.5

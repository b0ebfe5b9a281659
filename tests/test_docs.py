"""The README and every page of docs/ run as written, link to pages that exist, and name every public name.

A page is a notebook: its ```python blocks run in order in one namespace, and what a block prints stands in the
```text block right after it. Pictures and listings that nobody prints use a fence without a language.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import mono_quant_fx as mq

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/design.md",
    "docs/capture.md",
    "docs/skipping.md",
    "docs/numerics.md",
    "docs/observers.md",
    "docs/kernels.md",
    "docs/performance.md",
    "docs/compile.md",
    "docs/saving.md",
    "docs/compressed_tensors.md",
    "docs/command_line.md",
    "docs/reading_the_table.md",
    "docs/accuracy.md",
    "docs/explain.md",
    "docs/notebooks.md",
    "docs/writing_a_pass.md",
    "docs/migrating.md",
    "docs/glossary.md",
    "docs/contributing.md",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line its text starts at, and what lies between it and the last."""

    language: str
    text: str
    line: int
    gap: str


@dataclass(frozen=True)
class Example:
    """A python block and what the page says that it prints."""

    code: Block
    output: str


def blocks(text: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    found, end = [], 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(match[1], match[2], line, text[end : match.start()]))
        end = match.end()
    return found


def examples(page: str, text: str) -> list[Example]:
    """The page's examples; an output that follows no code is an error of the page."""
    found: list[Example] = []
    previous = ""
    for block in blocks(text):
        if block.language == "python":
            found.append(Example(block, ""))
        elif block.language == "text":
            assert previous == "python" and not block.gap.strip(), f"{page}:{block.line}: output without its code"
            found[-1] = Example(found[-1].code, block.text)
        previous = block.language
    assert any(e.output for e in found), f"{page} holds no example whose output is shown"
    return found


def run(page: str, code: Block, namespace: dict[str, object]) -> str:
    """What a block prints; its code is known to linecache under the page's name and lines, as a file's would be."""
    source = "\n" * (code.line - 1) + code.text
    linecache.cache[page] = (len(source), None, source.splitlines(keepends=True), page)
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(source, page, "exec", dont_inherit=True), namespace)
    return out.getvalue()


def stripped(text: str) -> str:
    """Without spaces at the ends of lines, which editors remove from a page."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_the_list_of_pages_is_complete():
    assert sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md")) == sorted(PAGES[1:])


@pytest.mark.parametrize("page", PAGES)
def test_examples_print_what_the_page_shows(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # Dynamo would open the page as the Python file that the code says it is from
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    found = examples(page, read(page))
    before = torch.get_default_dtype()
    for example in found:
        actual = stripped(run(page, example.code, module.__dict__))
        assert actual == stripped(example.output), f"{page}:{example.code.line} prints\n{actual}"
    assert torch.get_default_dtype() is before


def test_a_page_without_an_example_fails():
    with pytest.raises(AssertionError, match="no example whose output is shown"):
        examples("page.md", "# Page\n\n```python\nx = 1\n```\n")


def test_an_output_without_its_code_fails():
    with pytest.raises(AssertionError, match=r"page.md:6: output without its code"):
        examples("page.md", "```python\nprint(1)\n```\nand then\n```text\n1\n```\n")


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    links = [link for link in LINK.findall(FENCE.sub("", read(page))) if not link.startswith(("http:", "https:"))]
    for link in links:
        target, _, anchor = link.partition("#")
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page} links to {link}"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as repository hosts make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_readme_links_to_every_page_in_order():
    linked = [link for link in LINK.findall(read("README.md")) if link.startswith("docs/")]
    assert list(dict.fromkeys(linked)) == list(PAGES[1:])


def test_every_public_name_is_mentioned():
    text = "\n".join(map(read, PAGES))
    missing = [name for name in mq.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing, f"no page mentions {missing}"


def test_every_config_field_is_explained():
    text = read("docs/skipping.md")
    missing = [name for name in mq.QuantConfig.__dataclass_fields__ if f"| `{name}` |" not in text]
    assert not missing, f"docs/skipping.md has no row for {missing}"


def test_ci_runs_the_commands_of_the_readme():
    commands = [c for b in blocks(read("README.md")) if b.language == "sh" for c in b.text.splitlines()]
    commands = [c for c in commands if c.startswith("python3 -m venv")]
    assert len(commands) == 2
    script = any_venv(" ".join((ROOT / ".ci/run").read_text(encoding="utf-8").replace("\\\n", " ").split()))
    for command in commands:
        for part in command.split(" && ")[1:]:
            assert any_venv(part) in script, f".ci/run does not run {part!r}"


def any_venv(command: str) -> str:
    """A command without the folder of its virtual environment, which CI may choose."""
    return re.sub(r"[^\s\"']*\bbin/", "bin/", command.replace('"', "").replace("'", ""))

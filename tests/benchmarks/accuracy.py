"""Accuracy of real models, quantized in every way: python -m tests.benchmarks.accuracy

Runs each model with each setting of accuracy_settings.py (and with the packages of peers.py), each cell in a process of
its own, and writes docs/accuracy.md. Rows are kept in a cache: a run that was interrupted goes on where it stopped, and
what the sources have changed since is measured again. Needs the extra [bench]. Linux only (peak memory).
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import accuracy_cell, accuracy_page
from tests.benchmarks.accuracy_cache import DEFAULT, ROOT, Cache, Row, digest, environment, time_left
from tests.benchmarks.accuracy_settings import MODELS, SETTINGS, TINY_MODELS, Setting, workload

PAGE = ROOT / "docs/accuracy.md"
#: What Python runs for a cell; the model, the setting and the threads follow.
CELL = ("-m", "tests.benchmarks.accuracy_cell")
Cell = tuple[str, Setting]
RunCell = Callable[[str, Setting, int, float], dict[str, Any]]


def in_process_of_its_own(model: str, setting: Setting, threads: int, timeout: float) -> dict[str, Any]:
    """The cell's figures; what breaks it (a crash, the time limit) is an error in one line."""
    command = [sys.executable, *CELL, model, setting.name, str(threads)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"did not end within {timeout:.0f} s"}
    try:
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        figures = {"error": accuracy_cell.one_line(f"exit status {done.returncode}: {last}")}
    return figures


def in_this_process(model: str, setting: Setting, threads: int, _: float) -> dict[str, Any]:
    """The same without a process, for tiny models; its peak memory means little."""
    return accuracy_cell.measure(model, setting, threads)


def run(cells: Sequence[Cell], cache: Cache, options: argparse.Namespace, run_cell: RunCell) -> None:
    """Measures the cells that the cache lacks, one line a cell."""
    found = [cell for cell in cells if options.fresh or not cache.holds(cell[0], cell[1].name, digest(*cell))]
    print(f"{len(cells)} cells, {len(cells) - len(found)} of them in {cache.path}", flush=True)
    for number, (model, setting) in enumerate(found, 1):
        key, start = digest(model, setting), time.perf_counter()
        figures = run_cell(model, setting, options.threads, options.timeout)
        where = environment(setting, options.threads, datetime.date.today().isoformat())
        row = Row(model, setting.name, key, where, time.perf_counter() - start, **figures)
        cache.add(row)
        left = time_left(cache, list(found[number:]))
        remaining = "" if left is None else f"; {clock(left)} left"
        print(f"[{number}/{len(found)}] {model}, {setting.name}: {said(row)} ({row.wall_seconds:.0f} s{remaining})",
              flush=True)  # fmt: skip


def said(row: Row) -> str:
    """The outcome of a cell in a few words."""
    return row.error if row.error else f"{workload(row.model).METRIC} {row.value:.4g}"


def clock(seconds: float) -> str:
    """h:mm:ss.

    >>> clock(3725.4)
    '1:02:05'
    """
    return str(datetime.timedelta(seconds=round(seconds)))


def write_page(path: Path, models: Sequence[str], cache: Cache) -> None:
    """The page, from all rows that the cache has of these models."""
    known = {setting.name: setting for setting in SETTINGS}
    rows = [row for row in cache.rows.values() if row.model in models and row.setting in known]
    if not rows:
        sys.exit(f"{cache.path} holds no rows of {', '.join(models)}: leave --page-only out")
    stale = {(row.model, row.setting) for row in rows if row.digest != digest(row.model, known[row.setting])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(accuracy_page.page(rows, models, stale), encoding="utf-8")
    print(f"wrote {path}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a model or setting that matches nothing is an error."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.accuracy", description=__doc__)
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--settings", nargs="+", default=["*"], metavar="PATTERN", help="such as 'gptq*' or 'HQQ*'")
    parser.add_argument("--cache", type=Path, help=f"default: {DEFAULT}")
    parser.add_argument("--page", type=Path, help="default: docs/accuracy.md")
    parser.add_argument("--page-only", action="store_true", help="write the page from the cache and measure nothing")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache has")
    parser.add_argument("--quick", action="store_true", help="tiny models with random weights and no other packages")
    parser.add_argument("--threads", type=int, help="default: 2, and 1 with --quick, where sharing work costs more")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="of one cell")
    options = parser.parse_args(arguments)
    known = TINY_MODELS if options.quick else MODELS
    options.models = options.models or list(known)
    for name in options.models:
        if name not in known:
            parser.error(f"--models {name}: the models are {', '.join(known)}")
    for pattern in options.settings:
        if not fnmatch.filter([s.name for s in SETTINGS], pattern):
            parser.error(f"--settings {pattern}: matches none of {', '.join(s.name for s in SETTINGS)}")
    if options.quick and (options.page is None or options.cache is None):
        parser.error("--quick: give --cache and --page, so that its figures stay apart from those of real models")
    options.cache, options.page = options.cache or DEFAULT, options.page or PAGE
    options.threads = options.threads or (1 if options.quick else 2)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, then writes the page."""
    options = parse(arguments)
    chosen = [s for s in SETTINGS if any(fnmatch.fnmatchcase(s.name, p) for p in options.settings)]
    cells = [(model, s) for model in options.models for s in chosen if not (options.quick and s.is_peer)]
    cache = Cache(options.cache)
    if not options.page_only:
        run(cells, cache, options, in_this_process if options.quick else in_process_of_its_own)
    write_page(options.page, list(TINY_MODELS if options.quick else MODELS), cache)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with the cells that are left")

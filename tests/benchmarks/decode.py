"""Whole models beside their float selves and llama.cpp, in one process: python -m tests.benchmarks.decode

SmolLM2 reads a prompt and then token by token, with a static key-value cache; MiniLM encodes sentences. Contestants
take turns, and each figure is a median. With --page the figures are kept and docs/performance.md is written anew.
Needs the extra [bench]; what is not installed is named in the tables. Linux only (resident memory).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.config import patch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks import performance_page
from tests.benchmarks.accuracy_cache import ROOT
from tests.benchmarks.accuracy_cell import one_line
from tests.benchmarks.contestants import INT4, LLAMA_CPP, NO_CACHE, Kind, Language, Sentences, Steps, kinds
from tests.benchmarks.memory import resident, settle
from tests.benchmarks.performance_store import DEFAULT, PAGE, Store
from tests.benchmarks.timing import medians
from tests.real_models import smollm2

#: Sentences that MiniLM encodes at once.
BATCHES = (1, 32)
#: Whose memory is measured, each in a process of its own.
MEASURED = (*(str(Kind(w, d, "eager")) for w in ("float", INT4) for d in ("fp32", "bf16")),
            str(Kind(INT4, "bf16", "compiled")), LLAMA_CPP)  # fmt: skip
#: Whose decode is looked into: where does the time of a token go?
PROFILED = tuple(Kind(INT4, dtype, mode) for dtype in ("fp32", "bf16") for mode in ("eager", "compiled"))
#: Tokens after which the prompt without a cache is short.
SHORT = 16
Figures = dict[str, Any]


def start(makers: Mapping[str, Callable[[], Steps]], first: int) -> tuple[dict[str, Steps], dict[str, str]]:
    """The contestants, compiled and warm, and why some are missing.

    Args:
        first: the position of the first token after the prompt.
    """
    ready: dict[str, Steps] = {}
    reasons: dict[str, str] = {}
    for name, make in makers.items():
        began = time.perf_counter()
        try:
            steps = make()
            for _ in range(2):
                steps.prompt(), steps.token(first)
            ready[name] = steps
        except (Exception, SystemExit) as e:
            reasons[name] = one_line(f"{type(e).__name__}: {e}")
        print(f"{name}: {reasons.get(name, 'ready')} ({time.perf_counter() - began:.0f} s)", flush=True)
    return ready, reasons


def language(work: Language, makers: Mapping[str, Callable[[], Steps]], rounds: int) -> Figures:
    """SmolLM2's tokens a second, of the prompt and of the tokens after it; medians over turns and over tokens."""
    ready, reasons = start(makers, work.prompt)
    prompts: dict[str, list[float]] = {name: [] for name in ready}
    tokens: dict[str, list[float]] = {name: [] for name in ready}
    with patch(error_on_recompile=True):
        for _ in range(rounds):
            for name, steps in ready.items():
                prompts[name].append(_seconds(steps.prompt))
                tokens[name] += [_seconds(lambda i=i, s=steps: s.token(work.prompt + i)) for i in range(work.tokens)]
    found = {
        name: {"prefill": work.prompt / statistics.median(prompts[name]), "decode": 1 / statistics.median(tokens[name])}
        for name in ready
    }
    return {"prompt": work.prompt, "tokens": work.tokens, "contestants": found, "reasons": reasons}


def without_cache(work: Language, repeats: int = 3) -> Figures:
    """Tokens a second of the fp32 model that reads all of the text again for each token, by the length of the text."""
    steps = work.without_cache()
    lengths = (SHORT, work.prompt)
    taken = {n: statistics.median(_seconds(lambda n=n: steps.token(n)) for _ in range(repeats + 1)) for n in lengths}
    return {str(length): 1 / seconds for length, seconds in taken.items()}


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def profiled(work: Language, kind: Kind, count: int = 16) -> Figures:
    """Where the time of a token goes, in microseconds, by operator with all that it calls; and the number of calls."""
    steps = work.steps(kind)
    steps.prompt(), steps.token(work.prompt)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for i in range(count):
            steps.token(work.prompt + i)
    keys = {"int4_linear": "::int4_linear", "int8_linear": "::int8_linear", "attention": "::_scaled_dot_product"}
    groups, calls, total = dict.fromkeys(keys, 0.0), 0, 0.0
    for event in seen.key_averages():
        total += event.self_cpu_time_total / count
        calls += event.count
        for group, key in keys.items():
            if key in event.key:
                groups[group] += event.cpu_time_total / count
    return {"microseconds": {**groups, "all else": total - sum(groups.values())}, "calls": calls / count}


def sentences(work: Sentences, chosen: Sequence[Kind], batches: Sequence[int], seconds: float) -> Figures:
    """MiniLM's sentences a second, by batch and contestant."""
    runs = {str(kind): work.run(kind) for kind in chosen}
    found = {}
    for size in batches:
        batch = work.batch(size)
        for run in runs.values():
            run(batch)
        with patch(error_on_recompile=True):
            taken = medians({name: lambda _, run=run, b=batch: run(b) for name, run in runs.items()}, seconds)  # type: ignore[misc]
        found[str(size)] = {name: size / each for name, each in taken.items()}
        print(f"MiniLM, {size} at once: done", flush=True)
    return {"length": work.length, "sentences": found}


def memory(work: Language, name: str) -> Figures:
    """Bytes that are resident at most while the contestant reads and answers, beyond what Python and imports take."""
    make = work.all()[name]
    settle()
    before = resident("VmRSS")
    steps = make()
    steps.prompt(), steps.token(work.prompt)
    smollm2._reader.cache_clear()  # it holds the file that the weights come from
    settle()
    steps.prompt(), steps.token(work.prompt)
    return {"bytes": resident("VmHWM") - before}


def memories(names: Sequence[str], threads: int) -> Iterator[tuple[str, Figures]]:
    """memory() of each, in a process of its own; an error instead where it breaks."""
    for name in names:
        command = [sys.executable, "-m", "tests.benchmarks.decode", "--memory", name, "--threads", str(threads)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        wrong = (done.stderr.strip().splitlines() or ["no output"])[-1]
        yield name, json.loads(last) if last.startswith("{") else {"error": one_line(wrong)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.decode", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=("smollm2", "profile", "memory", "minilm"), metavar="PART",
                        default=["smollm2", "profile", "memory", "minilm"], help="default: all")  # fmt: skip
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="of SmolLM2's, such as 'bf16 eager'")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--tokens", type=int, default=128, help="after the prompt, in each turn")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of MiniLM's batches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--page", nargs="?", const=True, help="keep the figures, write docs/performance.md (or PAGE)")
    parser.add_argument("--cache", type=Path, default=DEFAULT, help=f"where --page keeps figures; default: {DEFAULT}")
    parser.add_argument("--memory", metavar="NAME", help="print what this contestant takes, as JSON")
    options = parser.parse_args(arguments)
    known = Language().all()
    for name in [*(options.contestants or []), *([options.memory] if options.memory else [])]:
        if name not in known:
            parser.error(f"{name}: the contestants are {', '.join(known)}")
    return options


def run(options: argparse.Namespace) -> None:
    """Measures the parts, prints each, and keeps it where the page is asked for."""
    work, store = Language(prompt=options.prompt, tokens=options.tokens), Store(options.cache)

    def keep(key: str, figures: Figures) -> None:
        print("\n" + performance_page.PARTS[key](figures), flush=True)
        if options.page:
            store.add(key, figures, ("llama-cpp-python",))

    if "smollm2" in options.parts:
        makers = {n: make for n, make in work.all().items() if n in (options.contestants or work.all())}
        figures = language(work, makers, options.rounds)
        keep("smollm2", {**figures, NO_CACHE: without_cache(work)})
    if "profile" in options.parts:
        keep("profile", {str(kind): profiled(work, kind) for kind in PROFILED})
    work.model.cache_clear()
    if "memory" in options.parts:
        keep("memory", dict(memories(MEASURED, options.threads)))
    if "minilm" in options.parts:
        keep("minilm", sentences(Sentences(), kinds(), BATCHES, options.seconds))
    if options.page:
        performance_page.write(PAGE if options.page is True else Path(options.page), store)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is asked for."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        if options.memory:
            print(json.dumps(memory(Language(), options.memory)))
        else:
            run(options)


if __name__ == "__main__":
    main()

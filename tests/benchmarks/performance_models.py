"""The tables of whole models in docs/performance.md, and what they say in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.accuracy_page import number, table
from tests.benchmarks.contestants import INT4, LLAMA_CPP, NO_CACHE

Figures = Mapping[str, Any]
MIB = 1 << 20

CONTESTANTS = """\
A llama of 135 million parameters. Every torch contestant is the same module (`tests/benchmarks/cached_llama.py`) with a
static key-value cache; `INT4` is `mq.quantize` of it as it comes (groups of 128, and of 64 where 128 does not divide a
row; round to nearest) with an INT8 head (`overrides={{"output": "int8"}}`). fp32 and bf16 name the type of the
activations and of what stays float. Compiled means `torch.compile(model, dynamic=False, fullgraph=True)`. The prompt is
read at once, and everyone computes the logits of its last token only. llama.cpp runs the GGUF file that the weights
come from (Q4_1: 4 bits in groups of 32 with a scale and a minimum; the embedding, which is the head too, in INT8).
`INT4 g32 asym` has that group size. The text is {prompt} random tokens, and {tokens} more, one by one.
"""

PROFILE = """\
Microseconds of the operators themselves in one token after the prompt, as torch's profiler sees them (which makes each
call slower), and the number of calls of anything that it sees:
"""

MEMORY = """\
Resident memory at its peak while the contestant reads the prompt and answers, each in a process of its own, beyond what
Python and the imports take; loading and quantizing are over. The INT4 ones hold the tied embedding twice: as a float
table, and as the INT8 head.
"""


def models_part(figures: Mapping[str, Figures]) -> str:
    """The whole part, as far as it was measured."""
    parts = []
    if "smollm2" in figures:
        found = figures["smollm2"]
        parts.append(f"## A language model: SmolLM2-135M\n\n{CONTESTANTS.format(**found)}\n{smollm2_text(found)}")
    if "profile" in figures:
        parts.append(f"### Where the time of a token goes\n\n{PROFILE}\n{profile_text(figures['profile'])}")
    if "memory" in figures:
        parts.append(f"### Memory\n\n{MEMORY}\n{memory_text(figures['memory'])}")
    if "minilm" in figures:
        length = figures["minilm"]["length"]
        parts.append(
            "## A sentence encoder: all-MiniLM-L6-v2\n\n"
            f"Sentences a second, of {length} tokens each.\n\n{minilm_text(figures['minilm'])}"
        )
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def smollm2_text(found: Figures) -> str:
    """The table of tokens a second, why someone is missing, and the verdicts."""
    contestants = found["contestants"]
    lines = [(name, number(each["prefill"], 0), number(each["decode"], 1)) for name, each in contestants.items()]
    for length, rate in found.get(NO_CACHE, {}).items():
        lines.append((f"{NO_CACHE}, after {length} tokens", "", number(rate, 1)))
    head = ("model", f"prompt of {found['prompt']}, tokens/s", f"then {found['tokens']} tokens, tokens/s")
    missing = [f"- {name}: `{reason.replace('`', '')}`" for name, reason in found["reasons"].items()]
    said = [*missing, *smollm2_verdicts(contestants, found.get(NO_CACHE, {}))]
    return table(lines, head) + ("\n" + "\n".join(said) + "\n" if said else "")


def models_summary(figures: Mapping[str, Figures]) -> list[str]:
    """SmolLM2 against llama.cpp and bfloat16, a line each."""
    found = figures.get("smollm2")
    lines = smollm2_verdicts(found["contestants"], {}) if found else []
    return [line.replace("- Against", "- SmolLM2 against") for line in lines if "fp32, " not in line.partition(":")[0]]


def smollm2_verdicts(contestants: Figures, no_cache: Mapping[str, float]) -> list[str]:
    """One sentence a rival: INT4's fastest form against it."""
    mine = {name: each for name, each in contestants.items() if name.startswith(f"{INT4},")}
    if not mine:
        return []
    lines = []
    rivals = {
        "llama.cpp": [n for n in contestants if n.startswith(LLAMA_CPP)],
        "bf16, eager": ["bf16 eager"], "bf16, compiled": ["bf16 compiled"],
        "fp32, eager": ["fp32 eager"], "fp32, compiled": ["fp32 compiled"],
    }  # fmt: skip
    for label, names in rivals.items():
        found = [contestants[name] for name in names if name in contestants]
        # an eager rival meets eager INT4
        able = {n: e for n, e in mine.items() if n.endswith("eager")} if label.endswith("eager") else mine
        if found and able:
            said = [_versus(able, max(f[what] for f in found), what) for what in ("prefill", "decode")]
            lines.append(f"- Against {label}: {'; '.join(said)}.")
    eager = {n: e for n, e in mine.items() if n.endswith("eager")}
    for length, rate in no_cache.items() if eager else ():
        lines.append(f"- Against fp32, eager, without a cache after {length} tokens: {_versus(eager, rate, 'decode')}.")
    return lines


def _versus(mine: Figures, rival: float, what: str) -> str:
    """INT4's best, as a multiple of a rival's rate.

    >>> _versus({"INT4, bf16 eager": {"prefill": 90.0}, "INT4, fp32 eager": {"prefill": 80.0}}, 100.0, "prefill")
    'prefill 0.90x (INT4, bf16 eager), **behind**'
    """
    best = max(mine, key=lambda name: mine[name][what])
    ratio = mine[best][what] / rival
    return f"{what} {ratio:.2f}x ({best})" + (", **behind**" if ratio < 1 else "")


def profile_text(found: Figures) -> str:
    """A line a contestant."""
    groups = list(next(iter(found.values()))["microseconds"])
    lines = [
        (name, *(number(each["microseconds"][g], 0) for g in groups), number(each["calls"], 0))
        for name, each in found.items()
    ]
    return table(lines, ("model", *groups, "calls"))


def memory_text(found: Figures) -> str:
    """A line a contestant, and why someone is missing."""
    lines = [(name, number(each["bytes"] / MIB, 0)) for name, each in found.items() if "bytes" in each]
    missing = [f"- {name}: `{each['error'].replace('`', '')}`" for name, each in found.items() if "error" in each]
    return table(lines, ("model", "MiB")) + ("\n" + "\n".join(missing) + "\n" if missing else "")


def minilm_text(found: Figures) -> str:
    """A line a contestant, a column a batch, and who is ahead."""
    batches = found["sentences"]
    names = list(next(iter(batches.values())))
    lines = [(name, *(number(batch[name], 0) for batch in batches.values())) for name in names]
    said = []
    for size, batch in batches.items():
        mine = max((n for n in batch if n.startswith(f"{INT4},")), key=batch.__getitem__, default=None)
        rival = max((n for n in batch if not n.startswith(f"{INT4},")), key=batch.__getitem__, default=None)
        if mine is not None and rival is not None:
            ratio = batch[mine] / batch[rival]
            behind = ", **behind**" if ratio < 1 else ""
            said.append(f"- {_at_once(size)}: {mine} {ratio:.2f}x the fastest float form ({rival}){behind}.")
    head = ("model", *(_at_once(size) for size in batches))
    return table(lines, head) + "\n" + "\n".join(said) + "\n"


def _at_once(size: str) -> str:
    return "one at a time" if size == "1" else f"{size} at once"

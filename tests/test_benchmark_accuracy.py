"""The accuracy benchmark without its hours: cache, command line, and a quick run on tiny models."""

import json
import sys
import types
from collections import Counter

import pytest
import torch

from tests.benchmarks import accuracy, accuracy_cache, accuracy_cell
from tests.benchmarks.accuracy_cache import Cache, Row, digest, time_left
from tests.benchmarks.accuracy_settings import (
    BY_NAME,
    MODELS,
    SETTINGS,
    workload,
)
from tests.test_docs import examples, stripped
from tests.test_docs import run as run_example

ENVIRONMENT = {
    "date": "2026-01-02", "cpu": "a processor", "threads": "2", "python": "3.11.0", "torch": "2.13.0",
    "package": "mono_quant_fx 0.1.0",
}  # fmt: skip
LEAST_SAME_ANSWERS = 0.8  # of 256 random inputs, 16 classes, INT4 by plain rounding


def row(model="tiny_mlp", setting="rtn asym g128", digest="d", **figures):
    package = BY_NAME[setting].package
    where = ENVIRONMENT | {"package": ENVIRONMENT["package"] if BY_NAME[setting].is_ours else f"{package} 1.0"}
    return Row(model, setting, digest, where, **{"wall_seconds": 10.0, **figures})


def fake_cells(calls, **figures):
    """A run_cell that measures nothing: it notes what it was asked, and says the figures."""

    def run_cell(model, setting, threads, timeout):
        calls.append((model, setting.name))
        return {"value": 0.5, **figures}

    return run_cell


def options(tmp_path, *more):
    arguments = ["--quick", "--cache", str(tmp_path / "a.jsonl"), "--page", str(tmp_path / "a.md"), *more]
    return accuracy.parse(arguments)


# cache


def test_a_row_comes_back_from_the_file_and_the_last_one_counts(tmp_path):
    cache = Cache(tmp_path / "folder" / "rows.jsonl")
    first, second = row(value=0.1, sqnr_db=float("inf")), row(value=0.2, schemes={"int8 channel": 3})
    cache.add(first)
    assert list(Cache(cache.path).rows.values()) == [first]
    cache.add(second)
    assert list(Cache(cache.path).rows.values()) == list(cache.rows.values()) == [second]


def test_a_line_that_an_interruption_cut_is_passed_over_and_not_glued_to_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    cache = Cache(path)
    cache.add(row(value=0.1))
    with path.open("a") as file:
        file.write('{"model": "tiny_mlp", "sett')
    cut = Cache(path)
    assert list(cut.rows.values()) == [row(value=0.1)]
    cut.add(row(setting="clip asym g128", value=0.2))
    assert [r.value for r in Cache(path).rows.values()] == [0.1, 0.2]


def test_figures_of_other_sources_and_errors_are_measured_again(tmp_path):
    cache = Cache(tmp_path / "rows.jsonl")
    cache.add(row(digest="old", value=0.1))
    assert cache.holds("tiny_mlp", "rtn asym g128", "old")
    assert not cache.holds("tiny_mlp", "rtn asym g128", "new")
    assert not cache.holds("tiny_mlp", "clip asym g128", "old")
    cache.add(row(digest="old", error="it broke"))
    assert not cache.holds("tiny_mlp", "rtn asym g128", "old")


def test_our_digest_follows_our_sources_and_a_peers_its_version(tmp_path, monkeypatch):
    for folder in ("mono_quant_fx", "passes", "tests/benchmarks", "tests/real_models"):
        (tmp_path / folder).mkdir(parents=True)
    sources = ["mono_quant_fx/gptq.py", "passes/a.py", "tests/real_models/minilm.py"]
    sources += [f"tests/benchmarks/{name}.py" for name in ("accuracy_cell", "peers", "tiny_models")]
    for name in sources:
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(accuracy_cache, "ROOT", tmp_path)
    ours, peer = BY_NAME["rtn asym g128"], BY_NAME["HQQ g128"]

    def digests():
        return [digest("minilm", ours), digest("minilm", peer), digest("tiny_mlp", ours)]

    before = digests()
    assert len(set(before)) == 3 and digests() == before
    changed = []
    for name in sources[:4]:
        (tmp_path / name).write_text("2")
        now = digests()
        changed.append([a != b for a, b in zip(before, now, strict=True)])
        before = now
    assert changed == [[True, False, True], [True, False, True], [True, True, False], [True, True, True]]
    monkeypatch.setattr(accuracy_cache, "version", lambda package: "2.0")
    assert [a != b for a, b in zip(before, digests(), strict=True)] == [False, True, False]


def test_time_left_is_what_each_cell_took_last_or_its_models_mean(tmp_path):
    cache = Cache(tmp_path / "rows.jsonl")
    asked = [("tiny_mlp", BY_NAME["rtn asym g128"]), ("tiny_mlp", BY_NAME["gptq asym g128"])]
    assert time_left(cache, []) == 0.0
    assert time_left(cache, asked) is None
    cache.add(row(setting="rtn asym g128", value=0.1, wall_seconds=10.0))
    cache.add(row(setting="clip asym g128", value=0.1, wall_seconds=30.0))
    assert time_left(cache, asked) == 10.0 + 20.0


# the command


def test_a_run_measures_what_is_missing_and_goes_on_after_an_interruption(tmp_path, capsys):
    given = options(tmp_path)
    settings = [BY_NAME[name] for name in ("float", "rtn asym g128", "gptq asym g128")]
    todo = [("tiny_mlp", s) for s in settings]

    def interrupted(model, setting, threads, timeout):
        if setting.name == "gptq asym g128":
            raise KeyboardInterrupt
        return {"value": 0.5}

    with pytest.raises(KeyboardInterrupt):
        accuracy.run(todo, Cache(given.cache), given, interrupted)
    calls = []
    accuracy.run(todo, Cache(given.cache), given, fake_cells(calls))
    assert calls == [("tiny_mlp", "gptq asym g128")]
    assert "[1/1] tiny_mlp, gptq asym g128: same answer 0.5 (0 s; 0:00:00 left)" in capsys.readouterr().out
    accuracy.run(todo, Cache(given.cache), given, fake_cells(calls))
    assert len(calls) == 1
    accuracy.run(todo, Cache(given.cache), options(tmp_path, "--fresh"), fake_cells(calls))
    assert len(calls) == 4


def test_an_error_is_a_row_and_is_tried_again(tmp_path, capsys):
    given = options(tmp_path)
    cell = ("tiny_mlp", BY_NAME["HQQ g128"])
    accuracy.run([cell], Cache(given.cache), given, lambda *_: {"error": "ImportError: no kernel"})
    assert "tiny_mlp, HQQ g128: ImportError: no kernel (" in capsys.readouterr().out
    assert Cache(given.cache).rows["tiny_mlp", "HQQ g128"].error == "ImportError: no kernel"
    calls = []
    accuracy.run([cell], Cache(given.cache), given, fake_cells(calls))
    assert calls == [("tiny_mlp", "HQQ g128")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "bert"], "--models bert: the models are minilm, smollm2, effnet_lite0, g2p_gru"),
        (["--settings", "awq*"], "--settings awq*: matches none of float, rtn sym g32, clip sym g32"),
        (["--quick"], "--quick: give --cache and --page, so that its figures stay apart from those of real models"),
    ],
)
def test_a_setting_of_the_command_that_means_nothing_is_an_error(arguments, message, capsys):
    with pytest.raises(SystemExit):
        accuracy.parse(arguments)
    assert message in capsys.readouterr().err


def test_without_arguments_everything_real_is_measured():
    given = accuracy.parse([])
    assert given.models == list(MODELS) and given.settings == ["*"] and given.threads == 2
    assert (given.cache, given.page) == (accuracy_cache.DEFAULT, accuracy.ROOT / "docs/accuracy.md")


def test_the_page_alone_measures_nothing(tmp_path, monkeypatch):
    given = options(tmp_path)
    Cache(given.cache).add(row(setting="float", value=1.0))
    monkeypatch.setattr(accuracy, "run", None)
    accuracy.main(["--quick", "--page-only", "--cache", str(given.cache), "--page", str(given.page)])
    assert "## tiny MLP" in given.page.read_text()


# a cell's own process


@pytest.fixture
def threads():
    """A cell sets the number of threads, which is the whole process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_process(monkeypatch, script, timeout=60.0):
    monkeypatch.setattr(accuracy, "CELL", ["-c", script])
    return accuracy.in_process_of_its_own("tiny_mlp", BY_NAME["float"], 1, timeout)


def test_a_process_that_crashes_or_hangs_is_an_error_in_one_line(monkeypatch):
    crash = "import sys; print('so far'); print('first\\nlast', file=sys.stderr); sys.exit(3)"
    assert run_process(monkeypatch, crash) == {"error": "exit status 3: last"}
    assert run_process(monkeypatch, "import os; os.kill(os.getpid(), 9)") == {"error": "exit status -9:"}
    assert run_process(monkeypatch, "import time; time.sleep(60)", 0.2) == {"error": "did not end within 0 s"}
    said = "import json, sys; print('noise'); print(json.dumps({'value': 1.0, 'asked': sys.argv[1:]}))"
    assert run_process(monkeypatch, said) == {"value": 1.0, "asked": ["tiny_mlp", "float", "1"]}


def cell_output(monkeypatch, capsys, work):
    monkeypatch.setattr(accuracy_cell, "workload", lambda _: work)
    monkeypatch.setattr(sys, "argv", ["cell", "tiny_mlp", "float", "1"])
    accuracy_cell.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_page_of_nothing_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"a\.jsonl holds no rows of tiny_mlp, tiny_conv: leave --page-only out"):
        accuracy.main(["--quick", "--page-only", "--cache", str(tmp_path / "a.jsonl"), "--page", str(tmp_path / "a")])


def test_a_cell_says_its_figures_or_its_error(monkeypatch, capsys, threads):
    assert cell_output(monkeypatch, capsys, workload("tiny_mlp")) == {"value": 1.0, "standard_error": 0.0}

    def skip():
        pytest.skip(f"the weights are missing:\n look in {sys.prefix}/share or {accuracy.ROOT}/docs")

    broken = types.SimpleNamespace(load=skip)
    said = cell_output(monkeypatch, capsys, broken)
    assert said == {"error": "Skipped: the weights are missing: look in <environment>/share or <sources>/docs"}


@pytest.mark.filterwarnings("ignore::mono_quant_fx.ExperimentalWarning")
def test_a_quick_run_measures_everything_and_its_page_runs(tmp_path, threads):
    given = options(tmp_path)
    where = ["--quick", "--cache", str(given.cache), "--page", str(given.page)]
    accuracy.main([*where, "--models", "tiny_mlp"])
    assert set(Cache(given.cache).rows) == {("tiny_mlp", s.name) for s in SETTINGS if not s.is_peer}
    accuracy.main([*where, "--models", "tiny_conv", "--settings", "float", "gptq*", "w8a8 minmax", "HQQ*"])
    rows = Cache(given.cache).rows
    assert Counter(model for model, _ in rows) == {"tiny_mlp": 22, "tiny_conv": 6}
    for r in rows.values():
        assert not r.error and r.value >= LEAST_SAME_ANSWERS
        if r.setting != "float":
            assert r.seconds > r.table_seconds > 0 and r.bits > 4 and r.peak_bytes >= 0 and r.sqnr_db > 0
    mlp = {name: r for (model, name), r in rows.items() if model == "tiny_mlp"}
    assert mlp["rtn sym g32"].schemes == {"int4 g32 sym": 128 * 64 + 64 * 16}
    assert mlp["rtn sym g32"].bits == 5.0 and mlp["gptq asym g32"].bits == 5.25
    assert mlp["w8a8 minmax"].sqnr_db > mlp["rtn sym g32"].sqnr_db  # gptq on 16 samples is no better on unseen ones
    text = given.page.read_text()
    for example in examples("accuracy.md", text):
        assert stripped(run_example("accuracy.md", example.code, {})) == stripped(example.output)
    assert "measured with other sources" not in text and "does not run" not in text

"""The settings of the accuracy benchmark, and docs/accuracy.md as it writes it, from rows made by hand."""

from tests.benchmarks import accuracy_page
from tests.benchmarks.accuracy_cache import Row
from tests.benchmarks.accuracy_compare import Comparison, comparisons, counterparts, verdicts
from tests.benchmarks.accuracy_settings import (
    ALGORITHMS,
    BY_NAME,
    MODELS,
    OBSERVERS,
    PEERS,
    SETTINGS,
    W4A8,
    WEIGHT_ONLY,
    workload,
)

ENVIRONMENT = {
    "date": "2026-01-02", "cpu": "a processor", "threads": "2", "python": "3.11.0", "torch": "2.13.0",
    "package": "mono_quant_fx 0.1.0",
}  # fmt: skip


def row(model="tiny_mlp", setting="rtn asym g128", digest="d", **figures):
    package = BY_NAME[setting].package
    where = ENVIRONMENT | {"package": ENVIRONMENT["package"] if BY_NAME[setting].is_ours else f"{package} 1.0"}
    return Row(model, setting, digest, where, **{"wall_seconds": 10.0, **figures})


def measured(setting, value, **figures):
    schemes = {"int4 g128 asym": 100}
    filled = {"standard_error": 0.01, "bits": 4.5, "seconds": 1.0, "peak_bytes": 1 << 20, "schemes": schemes}
    return row(setting=setting, value=value, **{**filled, **figures})


def cells(*rows):
    return {(r.model, r.setting): r for r in rows}


def test_every_combination_is_a_setting_of_its_own():
    assert len(BY_NAME) == len(SETTINGS)
    wanted = {(a, s, g) for a in ("rtn", "clip", "gptq") for s in (True, False) for g in (32, 128)}
    got = {(s.options["algorithm"], s.options["symmetric"], s.options["group_size"]) for s in WEIGHT_ONLY}
    assert got == wanted and len(WEIGHT_ONLY) == len(wanted)
    assert [BY_NAME[f"w8a8 {o}"].options for o in OBSERVERS] == [
        {"bits": 8, "activations": "int8", "observer": o} for o in OBSERVERS
    ]
    assert {s.options["activations"] for s in W4A8} == {"int8"}


def test_the_models_are_those_of_the_loaders():
    assert list(MODELS) == ["minilm", "smollm2", "effnet_lite0", "g2p_gru"]
    for key in MODELS:
        work = workload(key)
        assert work.NAME and work.METRIC and work.NUM_SAMPLES > 0 and isinstance(work.HIGHER_IS_BETTER, bool)


def test_every_peer_has_counterparts_at_its_group_size_and_symmetry():
    for peer in PEERS:
        found = [BY_NAME[name] for name in counterparts(peer).values() if name in BY_NAME]
        assert found and {s.options["group_size"] for s in found} == {peer.options["group_size"]}
        assert {s.options.get("symmetric", True) for s in found} == {peer.options["symmetric"]}
        assert {s.kind for s in found} == {peer.kind}


def test_the_page_is_dated_and_names_versions_seed_and_figures():
    rows = [row(setting="float", value=0.9), measured("gptq asym g128", 0.875, sqnr_db=12.34, local_sqnr_db=30.06,
            table_seconds=0.25)]  # fmt: skip
    text = accuracy_page.page(rows, ["tiny_mlp"], set())
    assert (
        "Measured 2026-01-02; CPU a processor, threads: 2; Python 3.11.0, torch 2.13.0; mono_quant_fx 0.1.0. Seed 0, "
        "set before each cell." in text
    )
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["", "float", "0.900", "", "", "", "", "", ""] in lines
    wanted = ["mono_quant_fx", "gptq asym g128", "0.875", "0.010", "12.3", "30.1", "4.50", "1.0 (0.2)", "1"]
    assert wanted in lines
    assert "same answer (higher is better)" in text
    assert "- tiny MLP: not measured: rtn sym g32, " in text


def test_the_page_says_what_does_not_run_and_which_rows_are_old():
    broken = row(setting="torchao int4 plain", error="ImportError: Requires `mslk`")
    old = measured("rtn asym g128", 0.5)
    text = accuracy_page.page([broken, old], ["tiny_mlp"], {("tiny_mlp", "rtn asym g128")})
    assert "- torchao 1.0, torchao int4 plain: `ImportError: Requires mslk` (every model)" in text
    assert "| torchao int4 plain" in text and "does not run" in text
    assert "measured with other sources than those beside this page: rtn asym g128" in text


def test_the_page_says_where_the_weights_became_different_things():
    mixed = measured("rtn asym g128", 0.5, schemes={"int8 channel": 10, "int4 g128 asym": 30})
    text = accuracy_page.page([mixed, measured("clip asym g128", 0.5)], ["tiny_mlp"], set())
    assert "- 75.0 % int4 g128 asym, 25.0 % int8 channel: rtn asym g128\n" in text
    assert "100.0 %" not in text


def test_a_peer_that_wins_is_never_hidden():
    found = cells(
        measured("rtn asym g128", 0.70), measured("clip asym g128", 0.795), measured("gptq asym g128", 0.85),
        measured("HQQ g128", 0.80),
    )  # fmt: skip
    text = verdicts(comparisons(["tiny_mlp"], found))
    assert "- **rtn** is ahead in 0 of 1 comparisons at equal group size, level in 0, behind in 1: " in text
    assert "behind in 1: HQQ g128 on tiny MLP by 0.100." in text
    assert "- **clip** is ahead in 0 of 1 comparisons at equal group size, level in 0, behind in 1: " in text
    assert "HQQ g128 on tiny MLP by 0.005 ≈." in text
    assert "- **gptq** is ahead in 1 of 1 comparisons at equal group size, level in 0, behind in 0." in text
    assert "- No other package is ahead of all algorithms anywhere." in text
    found["tiny_mlp", "HQQ g128"] = measured("HQQ g128", 0.9)
    lost = verdicts(comparisons(["tiny_mlp"], found))
    assert "- **Ahead of every algorithm of mono_quant_fx**: HQQ g128 on tiny MLP." in lost


def test_a_peer_that_leaves_weights_float_is_listed_and_not_counted():
    schemes = {"int4 g128": 25, "float32": 75}
    found = cells(measured("gptq asym g128", 0.8), measured("HQQ g128", 0.9, schemes=schemes, bits=25.1))
    text = verdicts(comparisons(["tiny_mlp"], found))
    assert "HQQ g128 on tiny MLP (75 % float, 25.10 bits)" in text
    assert "**gptq**" not in text and "-0.100" in text


def test_nothing_to_compare_gives_no_section():
    assert verdicts(comparisons(["tiny_mlp"], cells(measured("gptq asym g128", 0.8)))) == ""
    assert verdicts(comparisons(["tiny_mlp"], cells(measured("HQQ g128", 0.8)))) == ""
    broken = row(setting="HQQ g128", error="it broke")
    assert comparisons(["tiny_mlp"], cells(measured("gptq asym g128", 0.8), broken)) == []


def test_lower_is_better_for_a_perplexity():
    theirs, ours = row("smollm2", "HQQ g128", value=80.0), row("smollm2", "gptq asym g128", value=70.0)
    pair = Comparison("smollm2", "HQQ g128", theirs, {"gptq": ours}, True)
    assert pair.lead("gptq") == 10.0 and not pair.is_within_error("gptq")


def test_the_algorithms_compared_are_all_there_are():
    assert set(ALGORITHMS) == {s.options["algorithm"] for s in WEIGHT_ONLY}

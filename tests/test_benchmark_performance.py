"""The benchmarks `linear` and `decode` at tiny sizes; docs/performance.md as they write it, from figures by hand."""

import functools

import pytest
import torch

from mono_quant_fx.cli.demo_model import MiniLM
from tests.benchmarks import decode, linear, performance_page, timing
from tests.benchmarks.contestants import Kind, Language, Sentences, Steps, kinds
from tests.benchmarks.linear_peers import ATEN, BF16, FP32, PEERS, Peer, Shape, prepare
from tests.benchmarks.performance_linear import ahead
from tests.benchmarks.performance_models import minilm_text, smollm2_verdicts
from tests.benchmarks.performance_store import Store
from tests.real_models import smollm2

OURS = "mono_quant_fx"


def cells(text):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def table(shape="4096x4096", dtype="bfloat16", reasons=None, **milliseconds):
    rows = {m.removeprefix("m"): taken for m, taken in milliseconds.items()}
    return {"shape": shape, "group_size": 128, "dtype": dtype, "path": "avx2", "kernels": "avx2: why (available: avx2)",
            "milliseconds": rows, "reasons": reasons or {}}  # fmt: skip


def rates(**by_name):
    names = {"bf16": "bf16 eager", "fp32": "fp32 eager", "int4": "INT4, bf16 eager", "int4c": "INT4, fp32 compiled",
             "llama": "llama.cpp", "flash": "llama.cpp, flash attention"}  # fmt: skip
    return {names[key]: {"prefill": prefill, "decode": rate} for key, (prefill, rate) in by_name.items()}


def store(tmp_path, **sections):
    found = Store(tmp_path / "figures.json")
    for key, figures in sections.items():
        found.add(key.replace("_", " "), figures, ("tabulate",))
    return found


@pytest.fixture(scope="module")
def quick():
    """Turns without pauses and of one call, on one thread, where sharing work would take longer than the work."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PAUSE", 0.0), ("TURN", 0.0), ("LEAST", 1)):
            patch.setattr(timing, name, value)
        patch.setattr(linear, "MANY", 2)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def test_runs_take_turns_and_slow_ones_get_few_calls(monkeypatch):
    now, order = [0.0], []

    def run(name, seconds, _):
        order.append(name)
        now[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)
    runs = {"quick": functools.partial(run, "quick", 0.004), "slow": functools.partial(run, "slow", 5.0)}
    found = timing.medians(runs, 0.04)
    assert found == {"quick": pytest.approx(0.004), "slow": pytest.approx(5.0)}
    assert order.count("slow") == 1 + timing.LEAST  # one that is not counted
    assert order[:5] == ["quick"] * 3 + ["slow"] * 2
    assert order.count("quick") >= 0.02 / 0.004


def test_a_table_has_every_peer_or_its_reason(quick):
    def missing(_):
        raise ModuleNotFoundError("No module named 'absent'")

    def wrong(shape):
        return lambda x: lambda i: torch.zeros(x.shape[0], shape.outputs)

    peers = {FP32: PEERS[FP32], BF16: PEERS[BF16], ATEN: PEERS[ATEN], "quanto": Peer(missing), "bnb nf4": Peer(wrong)}
    found = linear.measure("32x64", [1, 3], peers, 32, "float32", 0.01, rotated=4096)
    assert list(found["milliseconds"]) == ["1", "3"]
    assert all(list(taken) == [OURS, FP32, BF16, ATEN] for taken in found["milliseconds"].values())
    assert all(each > 0 for taken in found["milliseconds"].values() for each in taken.values())
    assert found["reasons"] == {
        "quanto": "ModuleNotFoundError: No module named 'absent'",
        "bnb nf4": "ValueError: computes something else: relative error 1.00",
    }
    assert linear.overhead(0.01)["microseconds"].keys() == {"float32", "bfloat16"}


def test_every_peer_that_is_always_there_computes_the_product():
    weights = Shape([torch.randn(32, 64), torch.randn(32, 64)], 32)
    x = torch.randn(3, 64)
    for name in (FP32, BF16, ATEN):
        run = prepare(PEERS[name].make, weights)(x)
        for i in range(3):
            expected = x @ weights.weights[i % 2].T
            assert (run(i).float() - expected).norm() < 0.2 * expected.norm(), name


def tiny_language():
    return Language(lambda: smollm2.SmolLM2(48, 128, 1, 4, 2, 128, 1e-5, 1e4).eval(), prompt=4, tokens=3, vocabulary=48)


def test_language_models_take_turns_and_one_that_breaks_has_a_reason(quick):
    work = tiny_language()
    forms = Kind("float", "bf16", "eager"), Kind("INT4", "fp32", "eager")
    chosen = {str(kind): functools.partial(work.steps, kind) for kind in forms}

    def broken() -> Steps:
        raise ModuleNotFoundError("No module named 'llama_cpp'")

    with torch.inference_mode():
        found = decode.language(work, {**chosen, "llama.cpp": broken}, rounds=2)
        short = decode.without_cache(tiny_language(), 1)
    assert found["contestants"].keys() == {"bf16 eager", "INT4, fp32 eager"}
    assert all(rate > 0 for each in found["contestants"].values() for rate in each.values())
    assert found["reasons"] == {"llama.cpp": "ModuleNotFoundError: No module named 'llama_cpp'"}
    assert short.keys() == {"16", "4"} and work.model.cache_info().currsize >= 2
    with torch.inference_mode():
        seen = decode.profiled(work, Kind("INT4", "fp32", "eager"), 2)
    assert all(each > 0 for each in seen["microseconds"].values()) and seen["calls"] > 20


def tiny_encoder():
    config = {
        "hidden_size": 64, "layer_norm_eps": 1e-12, "vocab_size": 40, "max_position_embeddings": 8,
        "type_vocab_size": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1,
    }  # fmt: skip
    return MiniLM(config).eval()


def test_sentences_are_encoded_in_every_form(quick):
    work = Sentences(tiny_encoder, vocabulary=40, length=6)
    with torch.inference_mode():
        found = decode.sentences(work, [k for k in kinds() if k.mode == "eager"], (1, 3), 0.01)
    assert found["length"] == 6 and found["sentences"].keys() == {"1", "3"}
    for batch in found["sentences"].values():
        assert list(batch) == ["fp32 eager", "bf16 eager", "INT4, fp32 eager", "INT4, bf16 eager"]
        assert all(rate > 0 for rate in batch.values())


def test_figures_outlive_the_process_and_a_new_one_replaces_the_old(tmp_path):
    first = store(tmp_path, overhead={"a": 1}, minilm={"b": 2})
    again = Store(first.path)
    assert again.sections == first.sections
    again.add("overhead", {"a": 3})
    assert Store(first.path).sections["overhead"].figures == {"a": 3}
    assert Store(first.path).sections["minilm"].environment["packages"].startswith("mono_quant_fx ")


def test_the_page_shows_ratios_and_never_hides_who_is_ahead(tmp_path):
    found = table(
        reasons={"torchao da8w4": "AssertionError: no `kernel`"},
        m1={OURS: 0.2, FP32: 4.0, BF16: 1.4, ATEN: 0.26, "ORT level 4": 0.36},
        m64={OURS: 4.0, FP32: 15.0, BF16: 3.2, ATEN: 8.0, "ORT level 4": 16.0},
    )
    in_float = table(dtype="float32", m1={OURS: 0.25, FP32: 3.0})
    slow = table(dtype="float32", m1={OURS: 1.0, FP32: 3.0}, m64={OURS: 20.0, FP32: 10.0})
    cost = {"microseconds": {"float32": {OURS: 9.04, "F.linear": 3.02}}, "path": "avx2"}
    kept = store(tmp_path, overhead=cost, linear_4096x4096=found, linear_float32=in_float, path_avx2=slow)
    text = performance_page.page(kept.sections)
    assert ["1", "0.200", "20.00x", "7.00x", "1.30x", "1.80x", "1.30x (aten int4pack)"] in cells(text)
    assert ["64", "4.000", "3.75x", "0.80x", "2.00x", "4.00x", "2.00x (aten int4pack)"] in cells(text)
    assert "**Ahead of mono_quant_fx**: bf16 F.linear at M = 64 (1.25 times as fast)." in text
    assert "- A linear of 4096x4096 is 7.00x as fast as bfloat16's at M = 1, and 0.80x at M = 64." in text
    assert "- torchao da8w4 (torchao): `AssertionError: no kernel`" in text
    assert ["1", "0.250", "12.00x"] in cells(text)
    assert ["64", "20.00 (0.50x)"] in cells(text)
    assert ["float32", "9.0", "3.0", "6.0"] in cells(text)
    assert "SmolLM2, where the time of a token goes, resident memory, MiniLM" in text.partition("left to measure")[2]


def test_a_tie_with_a_peer_is_not_ahead_and_a_lead_at_several_sizes_is_said_once():
    level = {"1": {OURS: 1.0, BF16: 1.0}}
    assert ahead({"milliseconds": level}) == "mono_quant_fx is ahead of every column at every M."
    lost = {m: {OURS: 3.0, BF16: taken} for m, taken in (("1", 1.0), ("2", 4.0), ("4", 1.5))}
    assert ahead({"milliseconds": lost}).endswith("bf16 F.linear at M = 1, 4 (2.00 to 3.00 times as fast).")


def test_models_are_compared_with_the_faster_llama_cpp_and_eager_with_eager():
    found = rates(
        bf16=(800.0, 20.0), int4=(760.0, 50.0), int4c=(900.0, 90.0), llama=(300.0, 100.0), flash=(450.0, 80.0)
    )
    lines = smollm2_verdicts(found, {"16": 10.0})
    assert lines == [
        "- Against llama.cpp: prefill 2.00x (INT4, fp32 compiled); decode 0.90x (INT4, fp32 compiled), **behind**.",
        "- Against bf16, eager: prefill 0.95x (INT4, bf16 eager), **behind**; decode 2.50x (INT4, bf16 eager).",
        "- Against fp32, eager, without a cache after 16 tokens: decode 5.00x (INT4, bf16 eager).",
    ]


def test_the_page_has_the_models_their_memory_and_where_time_goes(tmp_path):
    language = {"prompt": 512, "tokens": 128, "contestants": rates(bf16=(800.0, 20.0), int4=(760.0, 50.0)),
                "reasons": {"llama.cpp": "ModuleNotFoundError: No module named 'llama_cpp'"},
                "fp32 eager without a cache": {"16": 18.0, "512": 0.7}}  # fmt: skip
    seen = {"INT4, bf16 eager": {"microseconds": {"int4_linear": 9000.0, "all else": 4000.0}, "calls": 2000.0}}
    held = {"bf16 eager": {"bytes": 300 << 20}, "llama.cpp": {"error": "it broke"}}
    encoder = {"length": 32, "sentences": {"1": {"bf16 eager": 50.0, "INT4, bf16 eager": 40.0}}}
    kept = store(tmp_path, smollm2=language, profile=seen, memory=held, minilm=encoder)
    text = performance_page.page(kept.sections)
    assert ["bf16 eager", "800", "20.0"] in cells(text) and ["INT4, bf16 eager", "760", "50.0"] in cells(text)
    assert ["fp32 eager without a cache, after 16 tokens", "", "18.0"] in cells(text)
    assert "- llama.cpp: `ModuleNotFoundError: No module named 'llama_cpp'`" in text
    assert "The text is 512 random tokens, and 128 more" in text and '`overrides={"output": "int8"}`' in text
    assert ["INT4, bf16 eager", "9000", "4000", "2000"] in cells(text)
    assert ["bf16 eager", "300"] in cells(text) and "- llama.cpp: `it broke`" in text
    assert "- one at a time: INT4, bf16 eager 0.80x the fastest float form (bf16 eager), **behind**." in text
    assert "linears, the cost of a call, linears with float32 x" in text.partition("left to measure")[2]


def test_a_contestant_alone_has_no_verdict():
    assert smollm2_verdicts(rates(bf16=(1.0, 1.0)), {"16": 1.0}) == []
    assert smollm2_verdicts(rates(int4=(1.0, 1.0)), {}) == []
    assert "x the fastest" not in minilm_text({"sentences": {"1": {"bf16 eager": 50.0}}})


def test_the_command_line_names_what_it_knows(capsys):
    with pytest.raises(SystemExit):
        decode.parse(["--contestants", "onnx"])
    assert "onnx: the contestants are fp32 eager, fp32 compiled, " in capsys.readouterr().err
    assert linear.parse([]).shapes == ["4096x4096"]
    assert linear.parse(["--page"]).shapes == list(linear.SHAPES)

"""mq.explain: the whole story of a weight, a module or a node, and nothing that is not so."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph import tensors
from mono_quant_fx.reports.code_summary import summarize
from tests.harness import Snapshot
from tests.models import MLP, ConvNet, Reused, TiedLM


class Attention(nn.Module):
    """q and k of one input, which are merged, and a norm, which is skipped."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        self.v = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        x = self.norm(x)
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    config = mq.QuantConfig(group_size=32, activations="int8", accuracy_warning="ignore")
    return mq.quantize(MLP().eval(), calibration_data=[torch.randn(16, 64)], config=config)


def chapter(source, name, **keywords):
    (only,) = mq.explain(source, name, **keywords).chapters
    return only


def facts(source, name, **keywords):
    return dict(chapter(source, name, **keywords).facts)


def test_the_story_of_a_weight(result):
    told = facts(result, "fc1.weight")
    assert list(told) == [
        "op", "line", "weight", "decision", "input", "rounding", "stored", "scales", "zero points", "codes", "runs as",
        "accuracy",
    ]  # fmt: skip
    assert told["op"] == "linear linear of module fc1"
    assert re.fullmatch(r".*tests/models\.py:\d+: return self\.fc2\(F\.relu\(self\.fc1\(x\)\)\)", told["line"])
    assert (told["weight"], told["decision"]) == ("float32 [128, 64]", "int4 g32 sym")
    row = result.accuracy.rows[0]
    low, high = row.input_range
    assert told["input"].startswith(f"x, watched by minmax: min {low:.4g}, max {high:.4g}; INT8 with scale ")
    assert told["rounding"].startswith(f"gptq; gains {row.gain_db:.1f} dB over rounding to nearest")
    assert told["stored"] == "fc1.weight_packed int32 [128, 8], fc1.weight_scale float32 [128, 2]"
    assert told["zero points"] == "none: symmetric"
    assert told["runs as"] == "mono_quant_fx.w4a8_linear"
    assert f"weight {row.weight_sqnr_db:.1f} dB, alone {row.local_sqnr_db:.1f} dB" in told["accuracy"]
    steps = chapter(result, "fc1.weight").steps
    assert {s.pass_name for s in steps} == set(list(result.info.seconds)[1:-1]) - {"linear-merging"}


@pytest.mark.parametrize("name", ["fc1", "linear", "fc1_weight_packed", "fc1.weight_packed", "fc1.weight_scale"])
def test_a_weight_is_found_by_each_of_its_names(result, name):
    assert chapter(result, name) == chapter(result, "fc1.weight")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_figures_of_the_codes_are_those_of_the_stored_tensors(bits, symmetric):
    model = MLP().eval()
    with torch.no_grad():
        model.fc1.weight[0].zero_()
    out = mq.quantize(model, bits=bits, group_size=32, symmetric=symmetric, accuracy_warning="ignore")
    codes = chapter(out, "fc1").codes
    stored = out.graph_module.fc1
    q = tensors.get_attribute(out.graph_module, "fc1.weight" if bits == 8 else "fc1.weight_packed")
    if bits == 4:
        q = torch.stack([(q >> 4 * i) & 15 for i in range(8)], -1).flatten(1) - 8
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    assert codes.weights == q.numel() == 128 * 64
    assert list(codes.counts) == [int((q == code).sum()) for code in range(low, high + 1)]
    assert codes.saturated == int(((q == low) | (q == high)).sum())
    assert codes.used == len(q.unique())
    scale = stored.weight_scale
    assert (codes.rows, codes.groups) == tuple(scale.shape)
    assert codes.scales == pytest.approx((float(scale.min()), float(scale.median()), float(scale.max())))
    zeros = getattr(stored, "weight_zero_point", None)
    assert codes.zero_points == (None if zeros is None else (int(zeros.min()), int(zeros.max())))
    assert symmetric is (zeros is None)


def test_a_code_summary_reads_a_wide_weight_in_tiles(monkeypatch):
    out = mq.quantize(MLP().eval(), group_size=32, accuracy_warning="ignore")
    annotation = next(a for _, a in mq.graph.annotation.annotated(out.graph_module))
    whole = summarize(out.graph_module, annotation)
    monkeypatch.setattr(mq.numerics.affine, "TILE", 200)
    assert summarize(out.graph_module, annotation) == whole


def test_merged_rows_are_told_with_the_story_of_their_own_weight():
    gm = mq.capture(Attention().eval())
    out = mq.default_pipeline(mq.QuantConfig(group_size=32))(gm).graph_module
    told = facts(out, "v.weight")
    assert told["stored"] == "rows 32 to 95 of k_v.weight_packed int32 [64, 8], k_v.weight_scale float32 [64, 2]"
    assert told["runs as"] == "mono_quant_fx.int4_linear linear_1_merged, one product for linear_1, linear_2"
    steps = [(s.pass_name, s.node) for s in chapter(out, "v").steps]
    assert steps[:2] == [("skip-annotation", "v_weight"), ("int4-lowering", "v_weight_packed")]
    assert not [node for _, node in steps if node.startswith("k_weight")]
    assert steps[-1] == ("linear-merging", "linear_2")


def test_what_stays_float_says_why_and_what_is_planned_says_so():
    config = mq.QuantConfig(group_size=32)
    gm = mq.capture(Attention().eval())
    told = facts(mq.default_pipeline(config)(gm).graph_module, "norm")
    assert told["decision"] == "stays float32: default skip: LayerNorm"
    assert not {"stored", "codes", "scales", "runs as"} & set(told)
    decided = mq.passes.SkipAnnotation(config)(gm).graph_module
    assert facts(decided, "q")["decision"] == "int4 g32 sym, planned and not carried out yet"


def test_a_weight_of_several_ops_tells_of_each():
    result = mq.quantize(
        Reused().eval(), calibration_data=[torch.randn(4, 64)], group_size=32, accuracy_warning="ignore"
    )
    (only,) = mq.explain(result, "fc").chapters
    labels = [label for label, _ in only.facts]
    assert labels.count("op") == labels.count("input") == labels.count("accuracy") == 3
    assert labels.count("line") == 2
    assert [n for n in ("linear", "linear_1", "linear_2") if chapter(result, n) == only] == [
        "linear",
        "linear_1",
        "linear_2",
    ]


def test_a_module_explains_all_of_its_weights_and_no_others():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.ab = MLP(), MLP()

        def forward(self, x):
            return self.a(x) + self.ab(x)

    out = mq.quantize(Two().eval(), group_size=32, accuracy_warning="ignore")
    assert [c.title for c in mq.explain(out, "a").chapters] == ["a.fc1.weight", "a.fc2.weight"]
    tied = mq.quantize(TiedLM().eval(), group_size=32, skip_param_threshold=0, accuracy_warning="ignore")
    assert [c.title for c in mq.explain(tied, "head").chapters] == ["emb.weight"]


def test_nodes_without_a_weight_are_explained_too(result):
    relu = facts(result, "relu")
    assert (relu["op"], relu["reads"], relu["read by"]) == ("relu", "linear", "relu_quantized")
    assert relu["passes"] == "none changed it: it is as it was captured"
    made = chapter(result, "relu_quantized")
    assert [str(s) for s in made.steps] == [
        "activation-lowering made relu_quantized from relu: mono_quant_fx.quantize_activation(relu, fc2_input_scale, "
        "fc2_input_zero_point)"
    ]
    assert facts(result, "fc1.bias")["value"] == "float32 [128]"
    assert facts(result, "x")["op"] == "placeholder"
    assert facts(result, "output")["op"] == "output"


def test_a_module_without_weights_is_explained_by_its_nodes():
    gm = mq.quantize(ConvNet().eval(), torch.randn(1, 3, 8, 8), group_size=32, accuracy_warning="ignore").graph_module
    assert [c.title for c in mq.explain(gm, "bn").chapters]
    gm = mq.capture(nn.Sequential(nn.Linear(64, 64), nn.Tanh()).eval())
    assert facts(gm, "1")["op"] == "Tanh of module 1"
    assert [c.title for c in mq.explain(gm, "0").chapters] == ["_0_weight", "_0_bias", "linear"]


def test_an_exported_graph_tells_its_lines_too():
    model = MLP().eval()
    gm = mq.capture(model, torch.randn(2, 64), method="export")
    assert (
        "tests/models.py" in facts(mq.default_pipeline(mq.QuantConfig(group_size=32))(gm).graph_module, "fc2")["line"]
    )


def test_a_table_can_be_given_and_without_one_no_figure_is_told():
    gm = mq.capture(MLP().eval())
    out = mq.default_pipeline(mq.QuantConfig(group_size=32))(gm).graph_module
    assert "accuracy" not in facts(out, "fc1")
    table = mq.measure_accuracy(gm, out, [torch.randn(4, 64)], all_nodes=True)
    assert facts(out, "fc1", table=table)["accuracy"].startswith("linear: weight 2")
    assert facts(out, "relu", table=table)["accuracy"].startswith("relu: with all before it 2")
    with pytest.raises(mq.ConfigError, match=r"explain: table='x': what mq.measure_accuracy returns is needed"):
        mq.explain(out, "fc1", table="x")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fc1.wieght", "the nearest names are fc1.weight, "),
        ("linaer", "the nearest names are linear, linear_1"),
        ("fc", "the nearest names are fc2, fc1"),
        ("", "mq.format_graph(gm) lists its nodes"),
        (None, "mq.format_graph(gm) lists its nodes"),
        ("zzz", "mq.format_graph(gm) lists its nodes"),
    ],
)
def test_an_unknown_name_lists_the_nearest(result, name, words):
    said = f"explain: the graph has no node, module or weight {name!r}; {words}"
    with pytest.raises(mq.UnknownNameError, match=re.escape(said)) as caught:
        mq.explain(result, name)
    assert isinstance(caught.value, LookupError)


def test_what_is_no_graph_is_refused():
    with pytest.raises(mq.PreconditionError, match="a GraphModule or a QuantizationResult is needed, not MLP"):
        mq.explain(MLP(), "fc1")


def test_explaining_changes_nothing(result):
    before = Snapshot(result.graph_module)
    mq.explain(result, "fc1"), mq.explain(result, "relu")
    before.check(result.graph_module)


def test_text_and_html(result):
    explanation = mq.explain(result, "fc1")
    lines = str(explanation).splitlines()
    assert lines[0] == "fc1.weight"
    assert lines[1] == "  op           linear linear of module fc1"
    page = explanation._repr_html_()
    assert page.startswith("<h4>fc1.weight</h4><table>")
    assert page.count("<li>") == len(explanation.chapters[0].steps)
    arrow = mq.Chapter("<w>", (("<a>", "<b>"),), (mq.Step("<p>", "changed", "<n>", ("<n>",), "op", "<x>", "<y>"),))
    text = mq.Explanation("<w>", (arrow,))._repr_html_()
    assert not re.findall(r"<(?!/?(?:h4|table|tr|th|td|ol|li)>)", text)


def test_lines_of_the_tracer_and_of_torch_are_not_the_users():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return F.linear(x, self.w)  # the line

    out = mq.quantize(Functional().eval(), group_size=32, accuracy_warning="ignore")
    assert re.fullmatch(rf"{re.escape(__file__)}:\d+: return F\.linear\(x, self\.w\).*", facts(out, "w")["line"])

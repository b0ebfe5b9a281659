"""What a notebook shows of tables, results, passes and pipelines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import ClassVar

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.pass_change import option_text
from mono_quant_fx.web.page import asset, escape
from tests.models import MLP
from tests.test_pass_base import Note, ReluToTanh

VOID = ("br", "meta", "path", "rect")


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not the last open one."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def parse(html: str) -> list[str]:
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert not re.search(r"https?:|src=|href=|@import|url\(", html)
    return parser.seen


def row(node, **figures):
    return mq.AccuracyRow(node, "linear", "fc", "fc.weight", "int4 g128 sym", "", (8, 256), 8192, 1088, **figures)


def test_every_cell_carries_what_its_column_is_sorted_by():
    rows = (
        row("a", weight_sqnr_db=20.04, local_sqnr_db=float("inf"), max_abs_error=0.5, status="good"),
        row("b", weight_sqnr_db=-3.0, local_sqnr_db=float("nan"), status="critical"),
        row("c", status="float"),
    )
    html = mq.AccuracyTable(rows, samples=1).to_html()
    parse(html)
    body = html.partition("<tbody>")[2].partition("</tbody>")[0]
    a, b, c = body.split("</tr>")[:3]
    assert a.startswith('<tr class="good">') and b.startswith('<tr class="critical">')
    assert 'class="right bar" data-v="20.04" style="--w:33%">20.0<' in a
    assert 'data-v="Infinity" style="--w:100%">inf<' in a and 'data-v="0.5"' in a
    assert 'class="right" data-v="-3.0">-3.0<' in b, "no bar for a negative figure"
    assert 'data-v="">nan<' in b, "sorts with the empty cells"
    assert re.findall(r'data-v="([^"]*)"', c) == ["2048.0", "8192", "1088"]
    assert html.count("<tfoot>") == 1 and '<td class="left">total</td>' in html.partition("<tfoot>")[2]


def test_a_long_reason_is_broken_into_lines_and_a_short_one_is_not():
    table = mq.AccuracyTable((mq.AccuracyRow("n", "linear", "m" * 60, "w", "s", "short", (1, 1), 1, 1),))
    assert f'<td class="left long">{"m" * 60}</td>' in table.to_html()
    assert '<td class="left">short</td>' in table.to_html()
    assert "local dB, acc dB and max err need calibration_data or evaluation_data</p>" in table.to_html()


def test_the_scripts_cannot_end_early():
    for name in ("table.js", "draw.js"):
        assert "</" not in asset(name)
    for name in ("html.css", "draw.css"):
        assert "<" not in asset(name)


def test_what_no_xml_may_hold_is_replaced():
    assert escape("a\x00\x1b\ud800\uffffb'\n") == "a\ufffd\ufffd\ufffd\ufffdb&#x27;\n"


@pytest.mark.parametrize("data", [None, [torch.randn(8, 64)]])
def test_a_result_shows_figures_warnings_and_table(data):
    result = mq.quantize(MLP().eval(), group_size=32, calibration_data=data, accuracy_warning="ignore")
    result.info.warnings.append("<careful>")
    html = result._repr_html_()
    parse(html)
    assert "<b>2</b><span>layers quantized</span>" in html
    assert "&lt;careful&gt;" in html
    assert html.endswith(result.accuracy.to_html())
    assert ("needs calibration_data or evaluation_data</span>" in html) == (data is None)
    assert (f"<b>{result.info.sqnr_db:.1f} dB</b>" in html) if data else "<b>–</b>" in html


def test_a_pipeline_shows_its_passes_with_their_options():
    @dataclass(frozen=True)
    class Evil(Note):
        text: str = "<b>"
        name: ClassVar[str] = "<i>"

    batches = [torch.randn(2, 64)]
    pipeline = mq.Pipeline((*mq.default_pipeline(mq.QuantConfig(group_size=64), batches).passes, Evil()))
    html = pipeline._repr_html_()
    parse(html)
    assert "config=QuantConfig(group_size=64)" in html, "what differs from the defaults"
    assert "batches=1 items" in html and "algorithm=&#x27;gptq&#x27;" in html
    assert "<b>&lt;i&gt;</b>" in html and "text=&#x27;&lt;b&gt;&#x27;" in html
    assert "no passes" in mq.Pipeline(())._repr_html_()


def test_an_option_is_one_line():
    assert option_text("x" * 400) == "'" + "x" * 298 + "…"
    assert option_text(iter([])) == "a list_iterator"
    assert option_text((1, "a")) == "(1, 'a')"
    assert option_text(mq.QuantScheme(4, 64)) == "QuantScheme(group_size=64)"


def test_a_pass_result_tells_what_changed():
    gm = mq.capture(MLP().eval())
    result = mq.Pipeline((ReluToTanh(), ReluToTanh()))(gm)
    first, second = result.changes
    assert first == mq.PassChange("relu-to-tanh", len(gm.graph.nodes), len(gm.graph.nodes), (), (), ("relu",))
    assert second.is_empty and not first.is_empty
    html = result._repr_html_()
    parse(html)
    assert "<b>modified</b>" in html and "1 changed</summary><code>relu</code>" in html
    assert "<b>not modified</b>" in ReluToTanh()(result)._repr_html_()


def test_added_and_removed_nodes_are_counted_and_passes_that_chain_add_up():
    gm = mq.capture(nn.Sequential(nn.Linear(64, 32)).eval())
    annotated = mq.passes.SkipAnnotation(mq.QuantConfig(group_size=32))(gm)
    out = mq.Pipeline((mq.passes.Int4GroupwiseLowering(), mq.passes.DequantFusion()))(annotated)
    assert [change.name for change in out.changes] == ["skip-annotation", "int4-lowering", "dequant-fusion"]
    noted, lowered, fused = out.changes
    assert noted.changed and not noted.added
    assert "_0_weight_packed" in lowered.added and "_0_weight" in lowered.removed
    assert lowered.nodes_after == fused.nodes_before > fused.nodes_after
    assert fused.nodes_after == len(out.graph_module.graph.nodes)


class Printer:
    def __init__(self):
        self.said = ""

    def text(self, text):
        self.said += text


def pretty(value) -> str:
    printer = Printer()
    value._repr_pretty_(printer, False)
    return printer.said


def test_a_terminal_gets_text():
    result = mq.quantize(MLP().eval(), group_size=32, accuracy_warning="ignore")
    gm = mq.capture(MLP().eval())
    for value in (result, result.accuracy, mq.draw(gm)):
        assert pretty(value) == str(value)
    assert pretty(ReluToTanh()(gm)) == "modified\nrelu-to-tanh: 9 -> 9 nodes, 1 changed"
    assert pretty(mq.passes.LinearMerging()(gm)) == "not modified\nlinear-merging: 9 -> 9 nodes, no node differs"

"""Drawings: what they show, that they are well-formed, safe, the same each time, and small."""

from __future__ import annotations

import re
import time
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.reports.boxes import CROWD, build_tree
from mono_quant_fx.reports.drawing import _depth, _opened
from mono_quant_fx.reports.facts import collect_facts
from mono_quant_fx.reports.svg import Canvas, number
from tests.models import MLP
from tests.test_pass_base import ReluToTanh

SVG = "{http://www.w3.org/2000/svg}"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, mask):
        return x + self.down(torch.relu(self.up(self.norm(x)))) * mask


class Blocks(nn.Module):
    def __init__(self, count=4):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x, mask):
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.fixture(scope="module")
def quantized():
    model = Blocks().eval()
    batch = (torch.randn(8, 64), torch.ones(8, 1))
    return mq.capture(model), mq.quantize(model, group_size=32, calibration_data=[batch], accuracy_warning="ignore")


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def groups(root):
    return {box.key: box for box in root.groups()}


def test_weights_are_part_of_the_operation_that_reads_them(quantized):
    _, result = quantized
    shown = texts(mq.draw(result.graph_module, result.accuracy, max_boxes=1000).svg)
    assert shown.count("mono_quant_fx.int4_linear") == 8
    assert not [text for text in shown if "packed" in text or "scale" in text]
    lines = [text for text in shown if text.startswith("int4 g32 sym  ")]
    judged = [f"{row.judged_db:.1f} dB" for row in result.accuracy.rows if row.judged_db is not None]
    assert [line.rpartition("  ")[2] for line in lines] == judged and len(judged) == 8
    assert shown.count("LayerNorm") == 4 and shown.count("float32") == 4


def test_hovering_tells_the_decision_and_the_reason(quantized):
    _, result = quantized
    drawing = mq.draw(result.graph_module, result.accuracy, max_boxes=1000)
    titles = [e.text or "" for e in ElementTree.fromstring(drawing.svg).iter(f"{SVG}title")]
    (norm,) = [t for t in titles if "%blocks_0_norm = LayerNorm" in t]
    assert "decision: float, because default skip: LayerNorm" in norm
    assert "module: blocks.0.norm (LayerNorm)" in norm
    (up,) = [t for t in titles if t.startswith("%linear = ")]
    assert "int32[64, 8] int4 g32 sym" in up and "accuracy: " in up and "decision: int4 g32 sym" in up


def test_shapes_that_a_tracer_left_are_told():
    gm = mq.capture(MLP().eval())
    node = next(n for n in gm.graph.nodes if n.name == "relu")
    node.meta["val"] = torch.empty(2, 128, device="meta")
    (facts,) = [f for f in collect_facts(gm) if f.name == "relu"]
    assert "value: float32[2, 128]" in facts.tip


def test_modules_are_groups_that_open_as_deep_as_asked(quantized):
    gm, _ = quantized
    root = build_tree(collect_facts(gm))
    assert list(groups(root)) == ["", "blocks", *(f"blocks.{i}" for i in range(4))]
    assert [_depth(root, n) for n in (1, 3, 4, 7, 8, 26, 27)] == [1, 1, 1, 2, 2, 2, 3]
    assert texts(mq.draw(gm, max_boxes=8).svg).count("▸ blocks.3") == 1
    assert "▾ blocks.3" in texts(mq.draw(gm, max_boxes=100).svg)


def test_values_pass_through_ports(quantized):
    gm, _ = quantized
    outer = groups(build_tree(collect_facts(gm)))["blocks"]
    assert set(outer.ports) == {("x", "in"), ("mask", "in"), ("add_3", "out")}
    inner = groups(outer)["blocks.1"]
    assert set(inner.ports) == {("add", "in"), ("mask", "in"), ("add_1", "out")}


def test_a_module_called_twice_is_two_groups():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x, mask):
            return self.block(torch.tanh(self.block(x, mask)), mask)

    root = build_tree(collect_facts(mq.capture(Twice().eval())))
    assert list(groups(root)) == ["", "block", "block #2"]


@pytest.mark.parametrize("count", [CROWD, CROWD + 1, 500])
def test_a_crowd_is_cut_into_runs(count):
    class Flat(nn.Module):
        def forward(self, x):
            for i in range(count - 2):
                x = torch.relu(x) if i % 3 else x + x
            return x

    root = build_tree(collect_facts(mq.capture(Flat().eval())))
    sizes = [sum(child.kind != "port" for child in group.children) for group in root.groups()]
    assert max(sizes) <= CROWD and (len(sizes) > 1) == (count > CROWD)
    assert sum(1 for _ in root.operations()) == count


def test_every_drawing_is_well_formed_and_needs_nothing_from_outside(quantized):
    gm, result = quantized
    for drawing in (mq.draw(gm), mq.draw_diff(gm, result.graph_module), mq.draw(mq.capture(nn.Identity().eval()))):
        ElementTree.fromstring(drawing.svg)
        inner = re.findall(r"<svg.*?</svg>", drawing.html, re.DOTALL)
        assert inner and all(ElementTree.fromstring(svg) is not None for svg in inner)
        page = drawing.html.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//cdn|@import|url\(|src=|href=|\bid=\"(?!mqfx-)", page)


def test_the_same_graph_gives_the_same_bytes_and_another_another_id(quantized):
    gm, result = quantized
    twin = mq.capture(Blocks().eval())
    assert (mq.draw(gm).svg, mq.draw(gm).html) == (mq.draw(twin).svg, mq.draw(twin).html)
    ids = [
        re.findall(r' id="([^"]*)"', d.html) for d in (mq.draw(gm), mq.draw(result.graph_module), mq.draw_diff(gm, gm))
    ]
    assert all(len(found) == 1 for found in ids) and len({found[0] for found in ids}) == 3


def test_names_from_a_model_are_only_text():
    evil = '</title><script>alert("1")</script>\x00'
    gm = mq.capture(MLP().eval())
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["nn_module_stack"] = {"a": (f"a.{evil}", evil), "b": (f"a.{evil}.b", evil)}
    for drawing in (mq.draw(gm), mq.draw_diff(gm, ReluToTanh()(gm).graph_module)):
        ElementTree.fromstring(drawing.svg)
        assert drawing.html.count("<script>") == 1 and "alert(&quot;" in drawing.html
        assert "\x00" not in drawing.html


def test_a_difference_is_coloured_by_what_happened():
    gm = mq.capture(MLP().eval())
    drawing = mq.draw_diff(gm, ReluToTanh()(gm).graph_module)
    assert drawing.html.count('class="b op other chg"') == 2, "relu reads otherwise on both sides"
    assert "0 gone" in drawing.html and "0 new" in drawing.html and "1 changed" in drawing.html
    assert str(drawing) == mq.diff_graphs(gm, ReluToTanh()(gm).graph_module)
    assert str(mq.draw_diff(gm, gm)) == "no difference"
    assert not re.search(r'class="b [^"]*(add|del|chg)', mq.draw_diff(gm, gm).html)


def test_what_a_lowering_replaces_marks_the_operation_and_its_groups(quantized):
    gm, result = quantized
    html = mq.draw_diff(gm, result.graph_module).html
    assert html.count("~3") == 16, "norm, up and down of each block, closed and open, on both sides"


def test_the_text_form_is_the_graphs(quantized):
    gm, _ = quantized
    assert str(mq.draw(gm)) == mq.format_graph(gm)


def test_saving(quantized, tmp_path):
    drawing = mq.draw(quantized[0])
    drawing.save(tmp_path / "graph.svg")
    drawing.save(tmp_path / "graph.html")
    assert ElementTree.parse(tmp_path / "graph.svg").getroot().tag == f"{SVG}svg"
    assert drawing.html in (tmp_path / "graph.html").read_text(encoding="utf-8")
    with pytest.raises(mq.ConfigError, match=r"Drawing.save\('x.png'\): the name of a drawing ends in .html or .svg"):
        drawing.save("x.png")
    with pytest.raises(FileNotFoundError):
        drawing.save(tmp_path / "no" / "folder.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph.html", "graph.svg"]


def test_mistakes_are_named():
    gm = mq.capture(MLP().eval())
    with pytest.raises(mq.PreconditionError, match=r"draw: a GraphModule is needed, not MLP; mq\.capture"):
        mq.draw(MLP())
    with pytest.raises(mq.PreconditionError, match="draw_diff: a GraphModule is needed, not PassResult"):
        mq.draw_diff(gm, ReluToTanh()(gm))
    with pytest.raises(mq.ConfigError, match="draw: max_boxes=0: a whole number from 1 on is needed"):
        mq.draw(gm, max_boxes=0)
    with pytest.raises(mq.ConfigError, match="draw: table=3: an AccuracyTable is needed"):
        mq.draw(gm, 3)


def test_two_thousand_nodes_are_quick_and_below_two_megabytes():
    gm = mq.capture(Blocks(340).eval())
    operations = sum(node.op != "get_attr" for node in gm.graph.nodes)
    assert operations >= 2000
    started = time.perf_counter()
    drawing = mq.draw(gm)
    assert time.perf_counter() - started < 20, "a layout that is quadratic in the nodes takes minutes"
    assert len(drawing.html.encode()) < 2_000_000
    root = build_tree(collect_facts(gm))
    opened = _opened(root, _depth(root, 60))
    assert sum(c.kind != "port" for group in opened for c in group.children) - len(opened) + 1 <= 60
    assert len(drawing.svg) < 100_000


def test_the_numbers_of_a_picture_are_those_that_the_script_starts_from(quantized):
    root = build_tree(collect_facts(quantized[0]))
    canvas = Canvas(root, _opened(root, 2))
    width, height = canvas.sizes[root]
    assert f'width="{number(width)}" height="{number(height)}"' in canvas.svg(full=True)
    assert [number(v) for v in (0.25, 0.05, 0.0, 12.0, 3.14)] == ["0.3", "0.1", "0", "12", "3.1"]

import csv
import io
import json
import math
import re

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.execution import lockstep
from mono_quant_fx.execution.batch import Batch
from tests.models import MLP, ConvNet, Reused, TiedLM

CONFIG = mq.QuantConfig(group_size=32, skip_param_threshold=0)
FIGURE = 1e-4  # relative; the table sums in float64 over tiles, the oracle at once


def compile_(model, config=CONFIG, **kwargs):
    gm = mq.capture(model.eval(), **kwargs)
    return gm, mq.default_pipeline(config)(gm).graph_module


def test_local_and_accumulated_figures_equal_an_independent_computation():
    torch.manual_seed(3)
    model, data = MLP(), [torch.randn(4, 64), torch.randn(3, 64)]
    gm, out = compile_(model)
    first, second = mq.measure_accuracy(gm, out, data).rows
    x, rounded = torch.cat(data), mq.dequantize_model(out)
    with torch.no_grad():
        hidden = torch.relu(model.fc1(x))
        noisy = torch.relu(nn.functional.linear(x, rounded.fc1.weight, rounded.fc1.bias))
        reference = model.fc2(hidden)
        local = nn.functional.linear(hidden, rounded.fc2.weight, rounded.fc2.bias)
        accumulated = nn.functional.linear(noisy, rounded.fc2.weight, rounded.fc2.bias)
    assert first.local_sqnr_db == pytest.approx(first.accumulated_sqnr_db, rel=FIGURE)
    assert second.local_sqnr_db == pytest.approx(mq.sqnr_db(reference, local), rel=FIGURE)
    assert second.accumulated_sqnr_db == pytest.approx(mq.sqnr_db(reference, accumulated), rel=FIGURE)
    assert second.max_abs_error == pytest.approx(mq.max_abs_error(reference, accumulated), rel=FIGURE)
    assert second.weight_sqnr_db == pytest.approx(mq.sqnr_db(model.fc2.weight, rounded.fc2.weight), rel=FIGURE)
    assert second.local_sqnr_db > second.accumulated_sqnr_db
    assert (second.bytes_before, second.bytes_after) == (16 * 128 * 4, 16 * 128 // 2 + 16 * 4 * 4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_of_the_pipeline_can_be_measured(stage):
    x = torch.randn(2, 3, 8, 8)
    gm = mq.capture(ConvNet().eval())
    passes = (mq.passes.SkipAnnotation(CONFIG), mq.passes.Int4GroupwiseLowering(), mq.passes.DequantFusion())
    table = mq.measure_accuracy(gm, mq.Pipeline(passes[:stage])(gm).graph_module, [x])
    rows = {row.module: row for row in table.rows}
    assert list(rows) == ["conv", "bn", "depthwise", "up", "fc"]
    if stage == 1:
        assert rows["up"].scheme == "float32 (int4 g32 sym planned)"
        assert table.output_sqnr_db == math.inf
    else:
        assert rows["up"].scheme == "int4 g32 sym"
        assert 5 < rows["up"].local_sqnr_db < 40
        assert rows["fc"].status in ("ok", "warning", "good")
        assert rows["bn"].status == "float"


def test_lowered_and_fused_graphs_agree():
    gm = mq.capture(Reused().eval())
    lowered = mq.Pipeline((mq.passes.SkipAnnotation(CONFIG), mq.passes.Int4GroupwiseLowering()))(gm)
    fused = mq.passes.DequantFusion()(lowered)
    data = [torch.randn(5, 64)]
    a, b = (mq.measure_accuracy(gm, r.graph_module, data) for r in (lowered, fused))
    for x, y in zip(a.rows, b.rows, strict=True):
        assert x.local_sqnr_db == pytest.approx(y.local_sqnr_db, rel=FIGURE)
        assert x.accumulated_sqnr_db == pytest.approx(y.accumulated_sqnr_db, rel=FIGURE)


def test_a_shared_weight_has_a_row_a_use_and_counts_once():
    gm, out = compile_(Reused())
    rows = mq.measure_accuracy(gm, out, [torch.randn(2, 64)]).rows
    assert [r.node for r in rows] == ["linear", "linear_1", "linear_2"]
    assert [r.reason for r in rows] == ["", "shares the weight of linear", "shares the weight of linear"]
    assert [bool(r.bytes_before) for r in rows] == [True, False, False]


def test_without_data_only_the_weights_are_judged_and_the_table_says_so():
    gm, out = compile_(MLP())
    table = mq.measure_accuracy(gm, out)
    assert all(r.weight_sqnr_db is not None and r.local_sqnr_db is None and r.status != "float" for r in table.rows)
    assert table.output_sqnr_db is None
    assert str(table).endswith("local dB, acc dB and max err need calibration_data or evaluation_data")


def test_all_nodes_adds_every_floating_point_node_in_order():
    gm, out = compile_(MLP())
    rows = mq.measure_accuracy(gm, out, [torch.randn(2, 64)], all_nodes=True).rows
    assert [r.node for r in rows] == ["linear", "relu", "linear_1"]
    assert rows[1].accumulated_sqnr_db is not None
    assert rows[1].local_sqnr_db is None


def test_thresholds_decide_the_status():
    (gm, out), data = compile_(MLP()), [torch.randn(4, 64)]
    db = mq.measure_accuracy(gm, out, data).rows[0].local_sqnr_db
    for low, high, status in ((db + 1, db + 2, "critical"), (db - 1, db + 1, "warning"), (db - 2, db - 1, "ok")):
        table = mq.measure_accuracy(gm, out, data, sqnr_error_threshold=low, sqnr_warning_threshold=high)
        assert table.rows[0].status == status


def test_masks_of_minus_infinity_are_no_error():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x, keep):
            return self.fc(x).masked_fill(keep == 0, float("-inf"))

    gm, out = compile_(Masked())
    table = mq.measure_accuracy(gm, out, [(torch.randn(2, 64), torch.randint(0, 2, (2, 64)))], all_nodes=True)
    assert 5 < table.output_sqnr_db < 60


def test_only_the_live_set_is_held():
    gm, out = compile_(nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(64, 64), nn.ReLU())]))
    plan, held = lockstep.Lockstep(gm, out, {n.name for n in out.graph.nodes}), []
    run = lockstep._Run(plan, Batch((torch.randn(2, 64),)))
    run.walk(lambda *_: held.append(len(run.reference) + len(run.accumulated)))
    assert max(held) <= 8, "activations or weights pile up"
    assert not [n for n in run.accumulated if n.op != "output"]
    assert not [n for n in run.reference if n.op != "output"]


def test_buffers_that_a_forward_writes_stay_as_they_are():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1.0)
            return self.fc(x) + self.calls * 0

    model = Counter().eval()
    result = mq.quantize(model, torch.randn(2, 64), group_size=32, calibration_data=[torch.randn(2, 64)])
    assert model.calls.item() == 0
    assert result.graph_module.calls.item() == 0
    assert result.info.sqnr_db > 5


def test_errors_name_the_node_and_the_batch():
    gm, out = compile_(MLP())
    with pytest.raises(mq.CalibrationError, match=r"batch 1 fails at node 'linear' \(linear of \(2, 63\)"):
        mq.measure_accuracy(gm, out, [torch.randn(2, 64), torch.randn(2, 63)])
    with pytest.raises(mq.PreconditionError, match="no node is annotated; run skip-annotation on the graph first"):
        mq.measure_accuracy(gm, gm)
    with pytest.raises(mq.PreconditionError, match=r"the float graph has no weight 'fc1\.weight'"):
        mq.measure_accuracy(mq.capture(Reused().eval()), out)


def test_the_exports_hold_every_row():
    gm, out = compile_(TiedLM(), mq.QuantConfig(group_size=32, skip_param_threshold=0))
    table = mq.measure_accuracy(gm, out, [torch.arange(8).view(2, 4)])
    assert [r["node"] for r in csv.DictReader(io.StringIO(table.to_csv()))] == [r.node for r in table.rows]
    loaded = json.loads(table.to_json(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert loaded["rows"][0]["accumulated_sqnr_db"] == "inf"
    assert loaded["total"]["samples"] == 2
    assert table.to_markdown().startswith("| node ")
    assert len(re.findall("<tr[ >]", table._repr_html_())) == len(table.rows) + 2


def test_html_escapes_what_comes_from_the_model():
    row = mq.AccuracyRow("<script>alert()", "linear", "a&b", "w", "int4", '"><b>', (1, 1), 1, 1, status='" onclick="x')
    html = mq.AccuracyTable((row,)).to_html()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "a&amp;b" in html and "&quot;&gt;&lt;b&gt;" in html
    assert 'onclick="x' not in html


TABLE = """\
node    op      module        scheme         reason    weight      KiB    KiB after    weight dB    local dB    acc dB    max err  status
------  ------  ------------  -------------  --------  --------  -----  -----------  -----------  ----------  --------  ---------  --------
linear  linear  fc            int4 g128 sym            8x256       8.0          1.1         20.0        21.2      20.0       0.12  ok
total           model output                                       8.0          1.1                               20.0
"""  # noqa: E501


def test_the_table_reads_like_this():
    figures = (8192, 1088, 20.04, 21.2, 19.96, 0.123, "ok")
    row = mq.AccuracyRow("linear", "linear", "fc", "fc.weight", "int4 g128 sym", "", (8, 256), *figures)
    table = mq.AccuracyTable((row,), 19.96, 7)
    assert [line.rstrip() for line in str(table).splitlines()] == TABLE.splitlines()

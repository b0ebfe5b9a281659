"""Figures measure what they say: noise, shared memory, odd strides; and each column of the table, reckoned again."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.storage_bytes import stored_bytes
from tests.models import MLP


class Noisy(MLP):
    """Draws anew at every call, before and after its weights."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, training=True)) + torch.randn_like(x[:, :16])


class TestRandomOps:
    """Both graphs drew noise of their own: -1.8 dB, critical, where quantization costs 18.9 dB."""

    def test_only_quantization_is_measured(self):
        x = torch.randn(32, 64)
        gm = mq.capture(Noisy().eval(), x, method="symbolic")
        out = mq.default_pipeline(mq.QuantConfig(group_size=32))(gm).graph_module
        table = mq.measure_accuracy(gm, out, [x])
        torch.manual_seed(7)
        expected = gm(x)
        torch.manual_seed(7)
        true = mq.sqnr_db(expected, out(x))
        assert table.output_sqnr_db > 15 and table.output_sqnr_db == pytest.approx(true, abs=3)
        assert all(row.local_sqnr_db > 15 for row in table.rows)

    def test_a_graph_that_nothing_was_done_to_has_no_error(self):
        x = torch.randn(8, 64)
        gm = mq.capture(Noisy().eval(), x, method="symbolic")
        planned = mq.passes.SkipAnnotation(mq.QuantConfig(group_size=32))(gm).graph_module
        assert mq.measure_accuracy(gm, planned, [x]).output_sqnr_db == float("inf")

    def test_the_users_generator_stands_where_it_stood(self):
        x = torch.randn(8, 64)
        gm = mq.capture(Noisy().eval(), x, method="symbolic")
        out = mq.default_pipeline(mq.QuantConfig(group_size=32))(gm).graph_module
        before = torch.get_rng_state()
        mq.measure_accuracy(gm, out, [x])
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_corrected_bias_is_not_the_mean_of_the_noise(self):
        x = torch.randn(64, 64)
        gm = mq.capture(Noisy().eval(), x, method="symbolic")
        settings = mq.QuantConfig(group_size=32, algorithm="rtn", bias_correction=True)
        out = mq.default_pipeline(settings, [x])(gm).graph_module
        shift = tensors.get_attribute(out, "fc2.bias") - tensors.get_attribute(gm, "fc2.bias")
        assert float(shift.abs().max().detach()) < 0.1

    def test_the_load_test_draws_alike(self):
        x = torch.randn(8, 64)
        gm = mq.capture(Noisy().eval(), x, method="symbolic")
        out = mq.default_pipeline(mq.QuantConfig(group_size=32))(gm).graph_module
        assert mq.validate_quantization(gm, out, [x]).errors == ()


class TestMemoryThatTensorsShare:
    """Flat parameters: 256 bytes reported for 74,368, and a ratio of 0.02."""

    def test_views_of_one_storage_are_counted_by_what_they_refer_to(self):
        model = MLP().eval()
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        start = 0
        for name, p in list(model.named_parameters()):
            part = flat[start : start + p.numel()].view(p.shape)
            start += p.numel()
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(part))
        plain = mq.quantize(MLP().eval(), group_size=32).info
        info = mq.quantize(model, group_size=32).info
        assert info.original_bytes == plain.original_bytes == flat.nbytes
        assert info.compression_ratio == plain.compression_ratio > 3

    @pytest.mark.parametrize(
        ("make", "expected"),
        [
            (lambda t: [t], 240),
            (lambda t: [t, t], 240),
            (lambda t: [t[:10], t[5:20]], 80),
            (lambda t: [t[::2]], 120),
            (lambda t: [t[::2], t[1::2]], 240),
            (lambda t: [t[:6].view(2, 3).t(), t[3:6]], 24),
            (lambda t: [t[:5].expand(7, 5)], 20),
            (lambda t: [t[:0]], 0),
            (lambda t: [t, torch.zeros(3)], 252),
        ],
    )
    def test_every_byte_counts_once(self, make, expected):
        assert stored_bytes(make(torch.zeros(60))) == expected


class TestOddStrides:
    """A strided bias: "load test: the output differs"."""

    @pytest.mark.parametrize("skipped", [(), ("fc1",)])
    @pytest.mark.parametrize("bias", ["column", "expanded"])
    def test_the_load_test_compares_what_was_loaded(self, bias, skipped):
        model, x = MLP().eval(), torch.randn(8, 64)
        value = torch.randn(128, 3)[:, 1] if bias == "column" else torch.randn(1).expand(128)
        model.fc1.bias = nn.Parameter(value, requires_grad=False)
        gm = mq.capture(model)
        out = mq.default_pipeline(mq.QuantConfig(group_size=32, modules_to_not_convert=skipped))(gm).graph_module
        assert mq.validate_quantization(gm, out, [x]).errors == ()


class Shared(nn.Module):
    """Two linears that merge, a weight that is read twice, a norm, and skips between them."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.twice, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.left, self.out = nn.Linear(width, width), nn.Linear(width, 16)

    def forward(self, x):
        h = torch.tanh(self.q(x)) * self.k(x)
        h = self.twice(torch.relu(self.twice(h)) + x)
        return self.out(self.norm(self.left(h) + x))


def walk(gm, x, replaced=()):
    """Node name -> value of one run, by torch's own interpreter; `replaced` holds values that stand in."""
    found = {}

    class Keeping(torch.fx.Interpreter):
        def run_node(self, node):
            value = dict(replaced).get(node.name)
            found[node.name] = super().run_node(node) if value is None else value
            return found[node.name]

    with torch.no_grad():
        Keeping(gm).run(x)
    return found


def db(pairs):
    signal = sum(float(a.double().square().sum()) for a, _ in pairs)
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return float("inf") if noise == 0 else 10 * math.log10(signal / noise)


OVERRIDES = [(), (("left", "int8"),), (("left", "skip"), ("q", "int8")), (("twice", "int8"),)]
SETTINGS = st.fixed_dictionaries(
    {
        "symmetric": st.booleans(),
        "merge_linears": st.booleans(),
        "bias_correction": st.booleans(),
        "algorithm": st.sampled_from(["rtn", "gptq"]),
        "overrides": st.sampled_from(OVERRIDES),
    }
)


class TestEveryColumnReckonedAgain:
    """16 of 432 rows had another max err: bias correction beside skipped and INT8 layers."""

    @settings(deadline=None, derandomize=True, max_examples=12, phases=[Phase.explicit, Phase.generate])
    @example(
        options={
            "symmetric": True, "merge_linears": True, "bias_correction": True, "algorithm": "gptq",
            "overrides": OVERRIDES[2],
        },
        seed=1,
    )  # fmt: skip
    @given(options=SETTINGS, seed=st.integers(0, 5))
    def test_the_table_of_a_random_model(self, options, seed):
        torch.manual_seed(seed)
        model = Shared(64).eval()
        data, others = [torch.randn(24, 64)], [torch.randn(9, 64), torch.randn(5, 64)]
        gm = mq.capture(model)
        result = mq.quantize(
            gm, calibration_data=data, evaluation_data=others, group_size=32, accuracy_warning="ignore", **options
        )
        out, table = result.graph_module, result.accuracy
        rounded = mq.dequantize_model(out)
        state, after = dict(gm.named_parameters()), dict(rounded.named_parameters())
        exact, quantized = [walk(gm, x) for x in others], [walk(out, x) for x in others]
        seen = set()
        for row in table.rows:
            pairs = [(a[row.node], b[row.node]) for a, b in zip(exact, quantized, strict=True)]
            assert row.accumulated_sqnr_db == pytest.approx(db(pairs), abs=1e-2)
            largest = max(float((a - b).abs().max()) for a, b in pairs)
            assert row.max_abs_error == pytest.approx(largest, rel=1e-3, abs=1e-6)
            if row.weight not in state:  # a module that holds vectors only
                held = list(gm.get_submodule(row.weight).parameters())
                assert (row.bytes_before, row.status) == (sum(t.nbytes for t in held), "float")
                continue
            weight = state[row.weight].detach()
            assert row.shape == tuple(weight.shape)
            assert row.bytes_before == (0 if row.weight in seen else weight.nbytes)
            seen.add(row.weight)
            if row.weight_sqnr_db is None:
                assert row.status == "float"
                continue
            assert row.weight_sqnr_db == pytest.approx(db([(weight, after[row.weight])]), abs=1e-2)
            node = next(n for n in gm.graph.nodes if n.name == row.node)
            bias = after[row.weight.replace("weight", "bias")]
            inputs = [values[node.args[0].name] for values in exact]
            alone = [F.linear(h, after[row.weight], bias) for h in inputs]
            expected = [(a[row.node], b) for a, b in zip(exact, alone, strict=True)]
            assert row.local_sqnr_db == pytest.approx(db(expected), abs=1e-2)
        whole = [(a["output"], b["output"]) for a, b in zip(exact, quantized, strict=True)]
        assert table.output_sqnr_db == pytest.approx(db(whole), abs=1e-2)
        assert table.samples == 14

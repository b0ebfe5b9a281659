"""Linears that read one input as one op: when, what stays as it was, and how the pieces lie in memory."""

import copy
import io
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.execution import lockstep
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import annotated, stored_weight
from mono_quant_fx.ops import native
from tests import hf_models
from tests.harness import check_pass

#: The same products; torch's matmul of a wider matrix may take its sums in another order.
MERGED_TOLERANCE = 1e-5
FIELDS = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}


def apart(model, x=None, **fields):
    """The quantized graph, each linear by itself."""
    data = [x] if "activations" in fields else None
    with_data = {"calibration_data": data, "algorithm": "rtn"} if data else {}
    return mq.quantize(model.eval(), x, merge_linears=False, **FIELDS | with_data | fields).graph_module


def merged(model, x, **fields):
    """What the pass makes of it, held to the contract and to the same numbers."""
    return check_pass(mq.passes.LinearMerging(), apart(model, x, **fields), args=(x,), tolerance=MERGED_TOLERANCE)


def targets(gm):
    return Counter(n.target for n in gm.graph.nodes if n.op == "call_function")


def is_split(gm):
    """Views or copies?"""
    found = targets(gm)
    aten = torch.ops.aten
    return found[aten.split_with_sizes.default], found[aten.split_with_sizes_copy.default]


class Attention(nn.Module):
    """q, k and v of grouped heads, and gate and up."""

    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64, bias), nn.Linear(64, 32, bias), nn.Linear(64, 32, bias)
        self.gate, self.up, self.down = nn.Linear(64, 96, bias), nn.Linear(64, 96, bias), nn.Linear(96, 64, bias)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, n, 32).transpose(1, 2) for f, n in ((self.q, 2), (self.k, 1), (self.v, 1)))
        a = F.scaled_dot_product_attention(q, k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1))
        h = torch.tanh(a.transpose(1, 2).reshape(b, t, 64) + x)
        return self.down(F.silu(self.gate(h)) * self.up(h))


def test_the_graph_before_and_after():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return F.silu(self.gate(x)) * self.up(x)

    check_pass(
        mq.passes.LinearMerging(),
        apart(Gated()),
        before="""
            %x = placeholder
            %gate_weight_packed = get_attr gate.weight_packed      # int32[32, 8]  int4 g32 sym
            %gate_weight_scale = get_attr gate.weight_scale        # float32[32, 2]
            %linear = mono_quant_fx.int4_linear(%x, %gate_weight_packed, %gate_weight_scale, None, None, 32)
            %silu = silu(%linear, inplace=False)
            %up_weight_packed = get_attr up.weight_packed          # int32[32, 8]  int4 g32 sym
            %up_weight_scale = get_attr up.weight_scale            # float32[32, 2]
            %linear_1 = mono_quant_fx.int4_linear(%x, %up_weight_packed, %up_weight_scale, None, None, 32)
            %mul = mul(%silu, %linear_1)
            return %mul""",
        after="""
            %x = placeholder
            %gate_up_weight_packed = get_attr gate_up.weight_packed # int32[64, 8]
            %gate_up_weight_scale = get_attr gate_up.weight_scale  # float32[64, 2]
            %linear_merged = mono_quant_fx.int4_linear(%x, %gate_up_weight_packed, %gate_up_weight_scale, None, None, 32)
            %linear_split = aten.split_with_sizes(%linear_merged, [32, 32], -1)
            %linear = getitem(%linear_split, 0)                    # int4 g32 sym
            %silu = silu(%linear, inplace=False)
            %linear_1 = getitem(%linear_split, 1)                  # int4 g32 sym
            %mul = mul(%silu, %linear_1)
            return %mul""",  # noqa: E501
        args=(torch.randn(2, 64),),
        tolerance=MERGED_TOLERANCE,
    )


@pytest.mark.parametrize(("method", "symmetric"), [("symbolic", False), ("export", True)])
@pytest.mark.parametrize(
    ("op", "fields"),
    [
        (ops.int4_linear, {"compute": "float32"}),
        (ops.int8_linear, {"bits": 8}),
        (ops.w4a8_linear, {"activations": "int8"}),
        (ops.w8a8_linear, {"activations": "int8", "bits": 8}),
    ],
)
def test_every_linear_op_merges_into_views(op, fields, symmetric, method):
    x = torch.randn(2, 3, 64)
    captured = mq.capture(Attention().eval(), x, method=method)
    gm = merged(captured, x, symmetric=symmetric, **fields)
    assert targets(gm)[op] == 3
    assert is_split(gm) == (2, 0)
    assert [name for name in gm.state_dict() if "q_k_v" in name and name.endswith("bias")] == ["q_k_v.bias"]


def test_the_origin_of_each_node_is_told():
    gm = merged(mq.capture(Attention().eval(), torch.randn(1, 2, 64), method="export"), torch.randn(1, 2, 64))
    nodes = {n.name: n for n in gm.graph.nodes}
    assert [tensors.module_path(nodes[n]) for n in ("linear", "linear_1", "linear_2")] == ["q", "k", "v"]
    assert "self" in nodes["linear_2"].meta["stack_trace"]
    assert tensors.module_path(nodes["linear_merged"]) == tensors.module_path(nodes["linear_split"]) == ""


class Pair(nn.Module):
    """Two linears of one input, read as `read` says."""

    def __init__(self, read=lambda a, b: a + b, first=True, second=True, between=lambda x: x, rows=(32, 32)):
        super().__init__()
        self.a, self.b = nn.Linear(64, rows[0], first), nn.Linear(64, rows[1], second)
        self.read, self.between = read, between

    def forward(self, x):
        h = torch.tanh(x)
        a = self.a(h)
        return self.read(a, self.b(self.between(h)))


class Tied(Pair):
    def forward(self, x):
        h = torch.tanh(x)
        return self.a(h) + self.b(h) + self.a(torch.tanh(h))


class OneBias(Pair):
    def __init__(self):
        super().__init__()
        self.b.bias = self.a.bias


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (Pair(first=False), {}),
        (Pair(), {"overrides": {"a": "int4 g16"}}),
        (Pair(), {"overrides": {"a": "int4 asym"}}),
        (Pair(), {"overrides": {"a": "int8"}}),
        (Pair(), {"overrides": {"a": "skip"}}),
        (Pair(between=torch.tanh), {}),
        (Tied(), {}),
        (OneBias(), {}),
    ],
    ids=["bias", "group size", "zero points", "bits", "float", "input", "a weight read twice", "a bias read twice"],
)
def test_what_differs_stays_apart(model, fields):
    x = torch.randn(3, 64)
    check_pass(mq.passes.LinearMerging(), apart(model, x, **fields), modified=False, args=(x,))


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize(
    "between",
    [lambda x: x.mul_(2), lambda x: F.relu(x, inplace=True), lambda x: x.view(-1).mul_(2).view(x.shape)],
    ids=["method", "flag", "view"],
)
def test_an_input_that_is_written_into_between_keeps_them_apart(between, method):
    class Written(Pair):
        def forward(self, x):
            h = torch.tanh(x)
            a = self.a(h)
            self.between(h)
            return self.read(a, self.b(h))

    x = torch.randn(3, 64)
    captured = mq.capture(Written(between=between).eval(), x, method=method)
    check_pass(mq.passes.LinearMerging(), apart(captured, x), modified=False, args=(x,))


def test_a_write_into_other_memory_does_not_matter():
    class Cache(Pair):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.zeros(3, 32))

        def forward(self, x):
            h = torch.tanh(x)
            k = torch.tanh(self.a(h))
            self.kept.copy_(k)
            return k + self.b(h)

    x = torch.randn(3, 64)
    for method in ("symbolic", "export"):
        assert is_split(merged(mq.capture(Cache().eval(), x, method=method), x)) == (1, 0)


READERS = {
    "sum": (lambda a, b: a + b, True),
    "heads": (lambda a, b: torch.matmul(a.view(2, 5, 4, 8), b.view(2, 5, 4, 8).transpose(2, 3)), True),
    "flat rows": (lambda a, b: a.view(10, 32) @ b.view(10, 32).t(), True),
    "reshape": (lambda a, b: a.reshape(-1) * b.reshape(-1), True),
    "shape": (lambda a, b: a.view(b.shape[0], -1, 32) + b.view(a.shape[0], a.shape[1], 4, 8).flatten(2), True),
    "all in one view": (lambda a, b: a.view(-1) * b.view(-1), False),
    "a view of a transpose": (lambda a, b: a.transpose(0, 1).view(5, 2, 32) + b.transpose(0, 1), False),
    "output": (lambda a, b: b.expand_as(a), False),
    "output of a view": (lambda a, b: a.expand_as(b).transpose(0, 1)[..., 3:], False),
    "in place": (lambda a, b: a.add_(1) + b, True),
    "flag": (lambda a, b: F.relu(a, inplace=True) + b, True),
    "strides": (lambda a, b: a.as_strided((2,), (1,)) + b.flatten()[:2], False),
    "unknown": (lambda a, b: torch.fft.rfft(a).real + torch.fft.rfft(b).real, False),
}


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize(("read", "views"), READERS.values(), ids=READERS)
def test_pieces_are_views_only_where_every_reader_takes_them(read, views, method):
    x = torch.randn(2, 5, 64)
    captured = mq.capture(Pair(read).eval(), x, method=method)
    gm = merged(captured, x)
    assert is_split(gm) == ((1, 0) if views else (0, 1))
    assert gm(x).stride() == apart(captured, x)(x).stride()


def test_gradients_go_through_pieces_even_where_they_are_written_into():
    x, model = torch.randn(2, 5, 64, requires_grad=True), Pair(lambda a, b: (a * 2) * b)
    single = apart(model)
    for read in (model.read, lambda a, b: a.mul_(2) * b):
        model.read = read
        gm = mq.passes.LinearMerging()(apart(model)).graph_module
        (expected,), (actual,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (single, gm))
        torch.testing.assert_close(actual, expected, rtol=MERGED_TOLERANCE, atol=MERGED_TOLERANCE)


class Branches(nn.Module):
    """Linears of two inputs; `uses` gives (linear, input, reader) in order, and a linear may be used again."""

    def __init__(self, sizes, biases, uses):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(48, n, b) for n, b in zip(sizes, biases, strict=True))
        self.uses = uses

    def forward(self, x):
        inputs = x, torch.tanh(x)
        total = 0
        for linear, source, read in self.uses:
            y = self.linears[linear](inputs[source])
            total = (
                total
                + (torch.tanh(y) if read == 0 else y.view(-1, y.shape[-1]) if read == 1 else y.add_(1)).sum(-1).sum()
            )
        return total


@st.composite
def branches(draw):
    count = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.sampled_from([1, 8, 24, 33]), min_size=count, max_size=count))
    biases = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    use = st.tuples(st.integers(0, count - 1), st.integers(0, 1), st.integers(0, 2))
    uses = draw(st.lists(use, min_size=1, max_size=7))
    schemes = draw(
        st.lists(st.sampled_from(["int4 g16", "int4 g48", "int4 g16 asym", "int8"]), min_size=count, max_size=count)
    )
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    return Branches(sizes, biases, uses).eval(), dict(enumerate(schemes)), torch.randn(*leading, 48)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(branches())
def test_any_graph_computes_the_same_and_comes_back(case):
    model, schemes, x = case
    used = {linear for linear, *_ in model.uses}
    overrides = {f"linears.{i}": scheme for i, scheme in schemes.items() if i in used}
    single = apart(model, overrides=overrides)
    gm = mq.passes.LinearMerging()(single).graph_module
    torch.testing.assert_close(gm(x), single(x), rtol=MERGED_TOLERANCE, atol=64 * MERGED_TOLERANCE)
    assert mq.passes.LinearMerging()(gm).modified is False
    before, after = ({a.weight: stored_weight(m, a) for _, a in annotated(m)} for m in (single, gm))
    assert before.keys() == after.keys()
    for weight, stored in before.items():
        for a, b in zip(stored, after[weight], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert tensors.total_bytes(gm) == tensors.total_bytes(single)
    first, second = (mq.dequantize_model(m) for m in (single, gm))
    assert [tensors.op_name(n) for n in first.graph.nodes] == [tensors.op_name(n) for n in second.graph.nodes]
    assert all(torch.equal(t, first.state_dict()[name]) for name, t in second.state_dict().items())
    assert sorted(first.state_dict()) == sorted(second.state_dict())


def both(model, data, **fields):
    return [mq.quantize(model, calibration_data=data, merge_linears=m, **FIELDS | fields) for m in (True, False)]


@pytest.mark.parametrize("fields", [{}, {"activations": "int8"}, {"bias_correction": True}], ids=["w4", "a8", "bias"])
def test_tables_and_figures_are_those_of_the_single_layers(fields):
    on, off = both(Attention().eval(), [torch.randn(4, 3, 64)], algorithm="rtn", **fields)
    assert targets(on.graph_module)[torch.ops.aten.split_with_sizes.default] == 2
    assert [(r.node, r.op, r.module) for r in on.accuracy.rows[:3]] == [
        ("linear", "linear", "q"), ("linear_1", "linear", "k"), ("linear_2", "linear", "v"),
    ]  # fmt: skip
    for a, b in zip(on.accuracy.rows, off.accuracy.rows, strict=True):
        assert a.local_sqnr_db == pytest.approx(b.local_sqnr_db, abs=0.01)
        assert a.accumulated_sqnr_db == pytest.approx(b.accumulated_sqnr_db, abs=0.01)
    assert str(on.accuracy) == str(off.accuracy)
    a, b = vars(on.info), vars(off.info)
    assert {k: a[k] for k in a if k not in ("seconds", "sqnr_db")} == {
        k: b[k] for k in b if k not in ("seconds", "sqnr_db")
    }


def test_each_local_output_is_measured_on_float_inputs():
    """By hand: the float model's inputs, one layer quantized."""
    x, model = torch.randn(4, 3, 64), Attention().eval()
    on, _ = both(model, [x], evaluation_data=[x], algorithm="rtn")
    rounded = mq.dequantize_model(on.graph_module)
    for row, name in zip(on.accuracy.rows[:3], "qkv", strict=True):
        float_layer, layer = model.get_submodule(name), rounded.get_submodule(name)
        expected = mq.sqnr_db(float_layer(x), F.linear(x, layer.weight, layer.bias))
        assert row.local_sqnr_db == pytest.approx(expected, abs=0.01)


def test_the_merged_op_is_measured_on_float_inputs_once(monkeypatch):
    runs = Counter()
    execute = lockstep.execute

    def counted(gm, node, *rest):
        runs[node.name] += 1
        return execute(gm, node, *rest)

    monkeypatch.setattr(lockstep, "execute", counted)
    mq.quantize(Attention().eval(), calibration_data=[torch.randn(4, 3, 64)], algorithm="rtn", **FIELDS)
    # q, k and v: the float op, the piece of the accumulated result, the piece of the local one
    assert [runs[n] for n in ("linear_merged", "linear_split", "linear", "linear_2")] == [2, 2, 3, 3]


def test_checks_copies_moves_and_loads_treat_the_rows_like_any_tensor():
    x = torch.randn(2, 3, 64)
    model = Attention().eval()
    gm = mq.quantize(model, **FIELDS).graph_module
    assert mq.validate_quantization(mq.capture(model), gm, [x]).errors == ()
    half = copy.deepcopy(gm).to(torch.bfloat16)
    assert half.q_k_v.weight_scale.dtype is torch.bfloat16
    assert half(x.bfloat16()).dtype is torch.bfloat16
    other = mq.quantize(Attention().eval(), **FIELDS).graph_module
    file = io.BytesIO()
    torch.save(gm.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), gm(x))
    assert torch.equal(mq.dequantize_model(other)(x), mq.dequantize_model(gm)(x))


def test_dequantize_model_gives_names_kinds_and_structure_back():
    model = Attention().eval()
    back = mq.dequantize_model(mq.quantize(model, **FIELDS).graph_module)
    assert sorted(back.state_dict()) == sorted(model.state_dict())
    assert {n for n, _ in back.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert mq.format_graph(back) == mq.format_graph(mq.capture(model))


@pytest.mark.parametrize("flag", [True, False])
def test_the_setting_decides(flag):
    names = [p.name for p in mq.default_pipeline(mq.QuantConfig(merge_linears=flag)).passes]
    assert ("linear-merging" in names) is flag
    gm = mq.quantize(Attention().eval(), merge_linears=flag, **FIELDS).graph_module
    assert ("q.weight_packed" in gm.state_dict()) is not flag


def test_a_name_that_is_taken_is_left_alone():
    class Named(Pair):
        def __init__(self):
            super().__init__()
            self.a_b = nn.Linear(32, 32)

        def forward(self, x):
            return self.a_b(super().forward(x))

    x = torch.randn(3, 64)
    names = set(merged(Named(), x).state_dict())
    assert {"a_b.weight_packed", "a_b.weight_1_packed", "a_b.bias", "a_b.bias_1"} <= names


@pytest.mark.parametrize("path", [p for p in native.PATHS[1:] if p in mq.kernels().available])
@pytest.mark.parametrize("bits", [4, 8])
def test_kernels_give_the_same_bits(path, bits, monkeypatch):
    """Where torch's matmul is not taken: in INT4 at any number of rows, in INT8 up to 8."""
    monkeypatch.setenv(native.VARIABLE, path)
    native.path.cache_clear()
    single = apart(Attention(), bits=bits)
    gm = mq.passes.LinearMerging()(single).graph_module
    torch.use_deterministic_algorithms(True)  # the ways follow from the number of rows alone
    try:
        for rows in (1, 3, 8, *([16, 40] if bits == 4 else [])):
            x = torch.randn(1, rows, 64)
            assert torch.equal(gm(x), single(x))
    finally:
        torch.use_deterministic_algorithms(False)


def test_compile_and_export():
    x = torch.randn(3, 4, 64)
    gm = mq.quantize(Attention().eval(), **FIELDS).graph_module
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True, dynamic=True)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(gm, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (2, 7):
        x = torch.randn(size, 4, 64)
        torch.testing.assert_close(compiled(x), gm(x), rtol=0, atol=MERGED_TOLERANCE)
        torch.testing.assert_close(exported(x), gm(x), rtol=0, atol=MERGED_TOLERANCE)


def test_a_hugging_face_model_gets_views_at_any_batch_and_length():
    model, example = hf_models.build("llama"), hf_models.inputs("llama", 2, 9)
    single = apart(mq.capture(model, example), group_size=16)
    gm = mq.passes.LinearMerging()(single).graph_module
    assert is_split(gm) == (4, 0)  # q, k and v, and gate and up, in each of two layers
    for batch, length in ((2, 9), (3, 1), (1, 5)):
        inputs = hf_models.inputs("llama", batch, length)
        with torch.no_grad():
            actual, expected = hf_models.output(gm(**inputs)), hf_models.output(single(**inputs))
        torch.testing.assert_close(actual, expected, rtol=MERGED_TOLERANCE, atol=MERGED_TOLERANCE)

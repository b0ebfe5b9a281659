"""compile_backend: quantized linears between graph breaks, whose weights stay the model's own inputs."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend

import mono_quant_fx as mq
from mono_quant_fx import ops
from tests import hf_models
from tests.models import hopeless_

#: The graph sums as the eager ops do, but the inner backend may choose other kernels for what surrounds them.
ATOL = 1e-5


class Broken(nn.Module):
    """Two graphs around a print, the second with a weight of the first, a norm and a weight used by matmul."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.norm, self.odd = nn.LayerNorm(64), nn.Parameter(torch.randn(64, 40))
        self.head.weight = self.fc.weight

    def forward(self, x):
        y = self.fc(x).relu()
        torch._dynamo.graph_break()
        return self.norm(y + self.head(x)) @ self.odd


class Block(nn.Module):
    """A graph break inside a submodule, so that Dynamo compiles the submodule's own frames."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        y = self.q(x)
        torch._dynamo.graph_break()
        return self.o(y)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.lm_head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(64, 64)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(x)


def swapped(model, group_size=32):
    """The same model by hand: each linear of it on codes."""
    model = copy.deepcopy(model)
    for name, module in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]:
        model.set_submodule(name, mq.QuantizedLinearInt4.from_float(module, group_size))
    return model


def counted(**fields):
    """A backend, and the counter of the graphs that reach its inner one."""
    counter = CompileCounterWithBackend("eager")
    return mq.compile_backend(group_size=32, inner=counter, **fields), counter


def targets(counter):
    return [n.target for gm in counter.graphs for n in gm.graph.nodes if ops.is_ours(n.target)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_graphs_around_a_break_run_on_codes(inner):
    model, x = Broken().eval(), torch.randn(3, 64)
    before = {n: p.clone() for n, p in model.named_parameters()}
    backend = mq.compile_backend(group_size=32, inner=inner, overrides={"odd": "skip"})
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), swapped(model)(x), rtol=0, atol=ATOL)
    report = backend.report
    assert [len(g.rows) for g in report.graphs] == [1, 3]
    assert report.quantized == {"fc.weight": "int4 g32 sym"}
    assert report.skipped == {"norm.weight": "default skip: LayerNorm", "odd": "override 'odd': skip"}
    assert report.bytes_before == (64 * 64 + 64 + 64 * 40) * 4
    assert report.bytes_after == 64 * 64 // 2 + 64 * 2 * 4 + (64 + 64 * 40) * 4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_inner_backend_gets_codes_as_inputs_and_no_float_weight():
    model, x = Broken().eval(), torch.randn(3, 64)
    backend, counter = counted()
    torch.compile(model, backend=backend)(x)
    assert targets(counter) == [ops.int4_linear] * 3  # the matmul among them
    first = counter.graphs[0]
    assert [n.name for n in first.graph.nodes if n.op == "placeholder"] == [
        "l_self_modules_fc_parameters_bias_", "l_x_", "codes_0", "codes_1",
    ]  # fmt: skip
    assert not list(first.named_parameters()) and not list(first.named_buffers())


def test_schemes_rules_and_layouts_are_those_of_the_pipeline():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.wide = nn.Conv1d(16, 32, 4), nn.Linear(32, 24)
            self.emb, self.asym, self.lm_head = nn.Embedding(50, 32), nn.Linear(24, 40), nn.Linear(40, 32)

        def forward(self, x, ids):
            y = self.wide(self.conv(x).mT).mean(1) + torch.addmm(self.wide.bias, self.emb(ids), self.wide.weight.t())
            return self.lm_head(self.asym(y))

    model, x = Mixed().eval(), (torch.randn(2, 16, 9), torch.randint(50, (2,)))
    settings = {
        "group_size": 32, "skip_layer_names": ["emb"], "overrides": {"asym": "int4 channel asym", "wide": "int8"},
        "default_skips": False,
    }  # fmt: skip
    backend = mq.compile_backend(inner="eager", **settings)
    actual = torch.compile(model, backend=backend)(*x)
    expected = mq.quantize(model, x, **settings)
    torch.testing.assert_close(actual, expected.graph_module(*x), rtol=0, atol=ATOL)
    table = {row.weight: (row.scheme, row.reason, row.shape) for row in expected.accuracy.rows}
    assert {row.weight: (row.scheme, row.reason, row.shape) for row in backend.report.rows} == table


def test_a_new_batch_size_reuses_the_codes():
    model = Broken().eval()
    backend, counter = counted(overrides={"odd": "skip"})
    compiled = torch.compile(model, backend=backend)
    for batch in (3, 5, 9):
        x = torch.randn(batch, 64)
        torch.testing.assert_close(compiled(x), swapped(model)(x), rtol=0, atol=ATOL)
    assert counter.frame_count == 4  # each graph once for its size, once for any
    again = [row for g in backend.report.graphs[2:] for row in g.rows if row.weight == "fc.weight"]
    assert [row.reason for row in again] == ["codes of graph 0"] * 2
    made = [entry for kept in backend._codes._entries.values() for entry in kept.values()]
    assert len(made) == 1
    assert backend.report.bytes_before == (64 * 64 + 64 + 64 * 40) * 4


@pytest.mark.parametrize("dynamic", [True, None])
def test_a_dynamic_batch_compiles_once(dynamic):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)).eval()
    counter = CompileCounterWithBackend("aot_eager")
    backend = mq.compile_backend(group_size=32, inner=counter)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for batch in (4, 7, 12):
        x = torch.randn(batch, 64)
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), swapped(model)(x), rtol=0, atol=ATOL)
    assert counter.frame_count == 1


def test_a_weight_that_changes_is_rounded_again():
    model, x = Broken().eval(), torch.randn(3, 64)
    backend, counter = counted(overrides={"odd": "skip"})
    compiled = torch.compile(model, backend=backend)

    def check():
        torch.testing.assert_close(compiled(x), swapped(model)(x), rtol=0, atol=ATOL)

    check()
    model.fc.weight.copy_(torch.randn(64, 64))
    check()
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    check()
    model.fc.weight.data = torch.randn(64, 64)
    check()
    model.fc.weight = model.head.weight = nn.Parameter(torch.randn(64, 64))
    check()
    assert counter.frame_count == 2
    assert [row.weight for row in backend.report.graphs[0].rows] == ["fc.weight", "fc.weight (2)"]


def test_one_graph_for_like_modules_reads_the_codes_of_each():
    """Dynamo calls the frames of the first block with the weights of the second: baked-in codes would be wrong."""
    model, x = Layers().eval(), torch.randn(3, 64)
    backend, counter = counted(model=model)
    expected = swapped(model)
    expected.lm_head = model.lm_head  # Dynamo leaves a frame that breaks in a loop to Python
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected(x), rtol=0, atol=ATOL)
    assert counter.frame_count == 2
    assert sorted(backend.report.quantized) == [f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("o", "q")]
    reasons = {row.weight: row.reason for row in backend.report.rows}
    assert reasons["layers.1.q.weight"] == "Dynamo runs the graph of layers.0.q.weight here"
    assert "not seen so far: lm_head.weight (in code that Dynamo leaves to Python" in str(backend.report)


def test_a_pattern_that_a_shared_graph_cannot_follow_is_said():
    model, x = Layers().eval(), torch.randn(3, 64)
    backend, _ = counted(model=model, overrides={"layers.1.q": "int8"})
    with pytest.warns(mq.AccuracyWarning, match=r"layers\.1\.q\.weight: Dynamo runs the graph of layers\.0\.q\.weight"):
        torch.compile(model, backend=backend)(x)
    assert "so does not follow 'layers.1.q'" in str(backend.report)


def test_names_begin_in_the_frame_without_a_model_and_stay_unique():
    model, x = Layers().eval(), torch.randn(3, 64)
    backend, _ = counted(modules_to_not_convert=["layers.0"])
    torch.compile(model, backend=backend)(x)
    assert sorted(backend.report.quantized) == ["o.weight", "o.weight (2)", "q.weight", "q.weight (2)"]
    assert "so far, modules_to_not_convert: 'layers.0' matches nothing in the model; nearest: " in str(backend.report)


def test_a_function_of_two_modules_names_them():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph, self.blocks = nn.Linear(64, 64), [nn.Linear(64, 64).requires_grad_(False)]

        def forward(self, x):
            return self.blocks[0](self.graph(x))

    first, second, x = Uneven().eval(), Uneven().eval(), torch.randn(2, 64)
    backend, _ = counted()
    torch.compile(lambda x: first(x) + second(x), backend=backend)(x)
    assert sorted(backend.report.quantized) == [
        "first.blocks.0.weight", "first.graph.weight", "second.blocks.0.weight", "second.graph.weight",
    ]  # fmt: skip
    backend, _ = counted()
    torch.compile(first, backend=backend)(x)
    assert sorted(backend.report.quantized) == ["blocks.0.weight", "model.graph.weight"]


def test_two_models_through_one_backend():
    models, x = [nn.Sequential(nn.Linear(64, 32)).eval() for _ in range(2)], torch.randn(2, 64)
    backend = mq.compile_backend(group_size=32, inner="eager")
    for model in models:
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), swapped(model)(x), rtol=0, atol=ATOL)
    assert backend.report.quantized == {"0.weight": "int4 g32 sym", "0.weight (2)": "int4 g32 sym"}


def test_codes_die_with_the_model():
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    backend = mq.compile_backend(group_size=32, inner="aot_eager")
    torch.compile(model, backend=backend)(torch.randn(2, 64))
    entries = [weakref.ref(e) for kept in backend._codes._entries.values() for e in kept.values()]
    weight = weakref.ref(model[0].weight)
    assert len(entries) == 1 and entries[0]() is not None
    del model
    gc.collect()
    assert weight() is None and entries[0]() is None


def test_a_weight_that_requires_gradients_stays_float_in_grad_mode():
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(2, 64)
    backend = mq.compile_backend(group_size=32, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    with torch.enable_grad():
        with pytest.warns(mq.PerformanceWarning, match="a graph runs in float: it requires gradients; torch.no_grad"):
            out = compiled(x)
        assert torch.equal(out, model(x))
        out.sum().backward()
        assert model[0].weight.grad is not None
        assert "NOTHING WAS QUANTIZED: 1 x it requires gradients" in str(backend.report)
    torch.testing.assert_close(compiled(x), swapped(model)(x), rtol=0, atol=ATOL)
    assert backend.report.quantized == {"0.weight": "int4 g32 sym"} and not backend.report.skipped


def test_gradients_flow_through_frozen_weights():
    model, x = nn.Sequential(nn.Linear(64, 32)).eval().requires_grad_(False), torch.randn(2, 64, requires_grad=True)
    with torch.inference_mode():  # what is made here must not be an inference tensor, which has no gradients
        compiled = torch.compile(model, backend=mq.compile_backend(group_size=32, inner="aot_eager"))
        compiled(x.detach())
    with torch.enable_grad():
        (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (expected,) = torch.autograd.grad(swapped(model)(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL * 32)


def test_graphs_without_a_quantizable_weight_run_as_they_are():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            y = x.sin() + 1
            torch._dynamo.graph_break()
            return self.fc(y)

    model, x = Small().eval(), torch.randn(2, 8)
    backend = mq.compile_backend(inner="eager")
    assert str(backend.report).startswith("nothing was compiled so far: call the compiled model first")
    assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    text = str(backend.report)
    assert "NOTHING WAS QUANTIZED: 1 x 32 parameters < skip_param_threshold 512" in text
    assert "graphs without a weight: 0" in text and "graphs whose weights all stay as they are: 1" in text


def test_weights_inside_control_flow_stay_with_a_reason():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.b(torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False))

    model, x = Checkpointed().eval(), torch.randn(2, 64)
    backend = mq.compile_backend(group_size=32, inner="aot_eager")
    torch.compile(model, backend=backend)(x)
    assert backend.report.quantized == {"b.weight": "int4 g32 sym"}
    assert backend.report.skipped["a.weight"] == "inside a checkpointed block, left as it is"


def test_autocast_gives_the_dtype_that_it_gives_the_model():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    compiled = torch.compile(model, backend=mq.compile_backend(group_size=32, inner="aot_eager"))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == model(x).dtype == torch.bfloat16
        torch.testing.assert_close(compiled(x), swapped(model)(x), rtol=0, atol=2**-6)
    assert compiled(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"algorithm": "gptq"}, r"sees weights and no data, but algorithm='gptq' needs calibration_data.*quantize"),
        ({"activations": "int8"}, "activations='int8' needs calibration_data"),
        ({"bias_correction": True}, "bias_correction=True needs calibration_data"),
        ({"inner": "no such"}, "inner='no such': a backend that torch.compile knows is needed: .*inductor"),
        ({"bites": 4}, "bites=4: no such setting; did you mean bits"),
    ],
)
def test_bad_settings_are_config_errors(fields, words):
    with pytest.raises(mq.ConfigError, match=words):
        mq.compile_backend(**fields)


def test_a_weight_without_codes_stops_the_compilation_and_is_named():
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    model[0].weight[3, 5] = torch.nan
    compiled = torch.compile(model, backend=mq.compile_backend(inner="eager", group_size=32))
    with pytest.raises(BackendCompilerFailed, match=r"weight '0\.weight' cannot be quantized: it holds NaN"):
        compiled(torch.randn(2, 64))


def test_poor_weights_are_warned_of_or_refused_as_the_config_says():
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(2, 64)
    hopeless_(model)
    fields = {"group_size": 32, "inner": "eager", "sqnr_warning_threshold": 90, "sqnr_error_threshold": 80}
    with pytest.warns(mq.AccuracyWarning, match="CRITICAL: far too noisy: 1 of 1 nodes below 80 dB"):
        torch.compile(model, backend=mq.compile_backend(**fields))(x)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="CRITICAL"):
        torch.compile(model, backend=mq.compile_backend(accuracy_warning="error", **fields))(x)


def test_t5_with_its_cache_object_runs_on_codes():
    """torch.export refuses that object, so that quantize does not get at this model."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = hf_models.build("t5", use_cache=True)
    inputs = hf_models.inputs("t5", 2, 7)
    backend = mq.compile_backend(group_size=16, skip_param_threshold=64, inner="eager", model=model)
    out = torch.compile(model, backend=backend)(**inputs)
    assert mq.sqnr_db(hf_models.output(model(**inputs)), hf_models.output(out)) > 10
    linears = {f"{n}.weight" for n, m in model.named_modules() if type(m) is nn.Linear}
    assert {n for n in linears if n not in backend.report.quantized} == {"lm_head.weight"}


@pytest.mark.slow
def test_inductor_compiles_as_often_as_without_codes():
    model = Broken().eval()
    plain, counter = (CompileCounterWithBackend("inductor") for _ in range(2))
    backend = mq.compile_backend(group_size=32, inner=counter, overrides={"odd": "skip"})
    for compiler, expected in ((plain, model), (backend, swapped(model))):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=compiler, dynamic=True)
        for batch in (3, 8, 5):
            x = torch.randn(batch, 64)
            torch.testing.assert_close(compiled(x), expected(x), rtol=0, atol=ATOL)
    assert counter.frame_count == plain.frame_count == len(backend.report.graphs)

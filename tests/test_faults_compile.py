"""compile_backend on modules that spell their attributes oddly, and where Dynamo leaves code to Python."""

import warnings

import pytest
import torch
from torch import nn

import mono_quant_fx as mq


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Wrapper(nn.Module):
    """As PEFT's: what it has not is looked up in the model inside."""

    def __init__(self, model):
        super().__init__()
        self._buffers["shift"] = torch.randn(64)  # register_buffer asks __getattr__ first
        self.loose = {"it's": nn.Linear(64, 64)}
        self.head, self.model = nn.Linear(64, 64), model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def forward(self, x):
        return self.head(self.model(x)) + self.shift + self.loose["it's"](x)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x):
        return self.up(x).relu()


class Experts(nn.Module):
    """The usual loop over experts, whose break makes Dynamo give up on the whole function."""

    def __init__(self, expert):
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 4), nn.ModuleList(expert() for _ in range(4))

    def forward(self, x):
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            r = (chosen == i).nonzero()[:, 0]
            if r.numel() == 0:
                continue
            out[r] = expert(x[r])
        return out


def run(net, /, *calls, **fields):
    """The backend after the calls, the warnings that it gave, and the last output."""
    backend = mq.compile_backend(group_size=32, inner="eager", **fields)
    compiled = torch.compile(net, backend=backend)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for inputs in calls:
            out = compiled(*inputs)
    said = [str(w.message) for w in heard if issubclass(w.category, mq.PerformanceWarning)]
    return backend.report, said, out


@pytest.mark.parametrize("is_named", [False, True])
def test_a_module_with_a_getattr_of_its_own_is_quantized_under_its_own_names(is_named):
    """Dynamo spells its attributes self.__dict__['_modules']...: 'dict' object has no attribute '_modules'."""
    model, x = Wrapper(Wrapper(nn.Sequential(nn.Linear(64, 64)))).eval(), torch.randn(4, 64)
    report, said, out = run(model, (x,), model=model if is_named else None)
    inside = {"model.model.0.weight", "model.head.weight", "head.weight"}
    assert inside <= set(report.quantized) and len(report.quantized) == 5
    assert not said and not report.fallbacks
    assert 10 < mq.sqnr_db(model(x), out) < 60


@pytest.mark.parametrize("key", ["it's", 'a "b"', "back\\slash", "sp ace", "é", "class"])
def test_any_name_of_a_module_can_be_compiled(key):
    """A quote in a name was an unterminated string in the graph's code."""
    model, x = nn.Sequential(nn.ModuleDict({key: nn.Linear(64, 64)})).eval(), torch.randn(4, 64)
    model.forward = lambda x: model[0][key](x)
    for given in (None, model):
        torch._dynamo.reset()
        report, _, out = run(model, (x,), model=given)
        assert list(report.quantized.values()) == ["int4 g32 sym"]
        assert 10 < mq.sqnr_db(model(x), out) < 60


def test_a_function_that_dynamo_leaves_to_python_is_reported_and_warned_of():
    """The output is float, and the report said "nothing was compiled yet: call the compiled model first"."""
    model, x = Experts(lambda: nn.Linear(64, 64)).eval(), torch.randn(8, 64)
    report, said, out = run(model, (x,), (x,), model=model)
    assert torch.equal(out, model(x)), "it is indeed float"
    (fallback,) = report.fallbacks
    assert fallback.function == "Experts.forward" and fallback.place.startswith(f"{__file__}:")
    assert "aten.nonzero" in fallback.reason
    text = str(report)
    assert text.startswith("NOTHING WAS QUANTIZED: 0 of 5 weights quantized")
    assert "Dynamo left Experts.forward to Python at" in text and "not seen so far: gate.weight, experts.0" in text
    (warning,) = said  # once, and not at every call
    assert "Dynamo left Experts.forward to Python" in warning and "0 of 5 weights quantized" in warning


def test_pieces_that_dynamo_does_compile_stand_beside_what_it_leaves():
    model, x = nn.Sequential(Experts(Expert), Expert()).eval(), torch.randn(16, 64)
    report, said, out = run(model, (x,), model=model)
    assert {name.rpartition(".")[2] for name in report.quantized} == {"weight"} and len(report.quantized) == 5
    assert "5 of 6 weights quantized" in str(report)
    assert [f.function for f in report.fallbacks] == ["Experts.forward"] and len(said) == 1
    assert not torch.equal(out, model(x))


def test_a_frame_past_dynamos_recompile_limit_runs_in_float_and_the_report_says_so(caplog):
    class Tagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x, tag):
            return self.fc(x) + len(tag)

    model, x = Tagged().eval(), torch.randn(4, 64)
    report, _, out = run(model, *((x, "a" * i) for i in range(12)))
    assert torch.equal(out, model(x, "a" * 11)), "it is indeed float"
    assert len(report.graphs) == 8
    assert "Tagged.forward to Python at its recompile limit: further sizes and values run in float" in str(report)


def test_other_backends_and_fullgraph_are_none_of_its_business():
    model, x = Experts(lambda: nn.Linear(64, 64)).eval(), torch.randn(8, 64)
    backend = mq.compile_backend(group_size=32, inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", mq.PerformanceWarning)
        torch.compile(model, backend="eager")(x)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.UserError):
            torch.compile(model, backend=backend, fullgraph=True)(x)
    assert not backend.report.fallbacks


def test_without_a_call_the_report_claims_no_more_than_it_knows():
    assert str(mq.compile_backend(inner="eager").report) == (
        "nothing was compiled so far: call the compiled model first; if it was called, Dynamo left all of it to Python "
        "and what it gave is the float model's output"
    )


def test_a_failed_capture_names_compile_backend_among_the_ways_out():
    with pytest.raises(mq.CaptureError, match=r"try: torch\.compile\(model, backend=mq\.compile_backend\(\)\)"):
        mq.capture(Experts(Expert).eval(), torch.randn(8, 64), method="symbolic")

"""Capture: hooks and whatever stands around forward, frozen random numbers, odd names, and what errors say."""

import contextlib
import random
import types

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

import mono_quant_fx as mq

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
OPTIONS = {"group_size": 32, "skip_param_threshold": 0}
METHODS = pytest.mark.parametrize("method", ["symbolic", "export"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)

    def forward(self, x, scale: float = 1.0):
        return self.b(self.act(self.a(x))) * scale


def net(kind=Net):
    torch.manual_seed(0)
    return kind().eval(), torch.randn(8, 64)


def assert_same(gm, model, *args):
    with torch.no_grad():
        torch.testing.assert_close(gm(*args), model(*args), rtol=1e-5, atol=1e-5)


# --- Hooks and whatever else stands around forward ---


def double(module, args, output):
    return output * 2


def plus_one(module, args):
    return (args[0] + 1, *args[1:])


def with_keywords(module, args, kwargs, *output):
    return output[0] * 3 if output else (tuple(a - 1 for a in args), {k: v * 2 for k, v in kwargs.items()})


PLACES = {"root": lambda m: m, "linear": lambda m: m.a, "leaf": lambda m: m.act}
HOOKS = {
    "forward": lambda m: m.register_forward_hook(double),
    "pre": lambda m: m.register_forward_pre_hook(plus_one),
    "forward with kwargs": lambda m: m.register_forward_hook(with_keywords, with_kwargs=True),
    "pre with kwargs": lambda m: m.register_forward_pre_hook(with_keywords, with_kwargs=True),
    "always called": lambda m: m.register_forward_hook(double, always_call=True),
}


@METHODS
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", PLACES)
def test_a_hook_that_changes_what_flows_is_in_the_graph(place, hook, method):
    """A forward hook or pre-hook on the root was dropped: true 0 dB, reported 45."""
    model, x = net()
    HOOKS[hook](PLACES[place](model))
    by_name = [] if hook == "pre" else [{"x": x, "scale": torch.tensor(0.5)}]
    for example in (x, *by_name):
        gm = mq.capture(model, example, method=method)
        args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
        with torch.no_grad():
            torch.testing.assert_close(gm(*args, **kwargs), model(*args, **kwargs), rtol=1e-5, atol=1e-5)
    if method == "symbolic":
        assert_same(mq.capture(model), model, x)


class Features(Net):
    """Adds what a hook noted, which closes over the model, or over a function that does."""

    def __init__(self):
        super().__init__()
        self.kept = {}

        def note(value):
            self.kept["act"] = value

        self.act.register_forward_hook(lambda module, args, output: note(output))

    def forward(self, x):
        return super().forward(x) + self.kept["act"]


@METHODS
def test_a_hook_whose_output_the_forward_reads_is_run_by_the_trace(method):
    model, x = net(Features)
    model(torch.ones(2, 64))  # an earlier call, whose features must not be frozen
    kept = dict(model.kept)
    gm = mq.capture(model, x, method=method)
    assert {name: id(value) for name, value in model.kept.items()} == {n: id(v) for n, v in kept.items()}
    assert_same(gm, model, torch.randn(3, 64))


@METHODS
def test_a_forward_that_closes_over_the_model_runs_on_the_copy(method):
    model, x = net()
    model.forward = lambda x: model.b(model.a(x)) + 1
    before = model.forward
    assert_same(mq.capture(model, x, method=method), model, torch.randn(3, 64))
    assert model.forward is before


@pytest.mark.parametrize("kind", ["forward", "pre"])
@pytest.mark.parametrize("place", ["root", "linear", "leaf"])
def test_a_hook_in_a_given_graph_is_kept_or_refused_by_name(place, kind):
    """Any hook inside a GraphModule that was given was dropped."""
    model, x = net()
    gm = fx.symbolic_trace(model)
    HOOKS[kind](PLACES[place](gm))
    if place == "root":
        with pytest.raises(mq.CaptureError, match=r"(double|plus_one) acts around the graph, .*: remove it"):
            mq.quantize(gm, **OPTIONS)
        with pytest.raises(mq.CaptureError, match="something else than the model"):
            mq.quantize(gm, x, **OPTIONS)
    else:
        assert_same(mq.capture(gm, x), gm, x)
        assert_same(mq.capture(gm), gm, x)


def test_a_hook_on_a_given_graph_that_only_looks_is_no_obstacle_where_that_can_be_seen():
    model, x = net()
    gm, seen = fx.symbolic_trace(model), []
    gm.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same(mq.capture(gm, x), model, x)
    assert seen == []


def test_a_given_graph_whose_call_is_another_is_refused():
    model, x = net()
    gm = fx.symbolic_trace(model)
    gm.forward = types.MethodType(lambda self, x, scale=1.0: self.a(x), gm)
    for example in (None, x):
        with pytest.raises(mq.CaptureError):
            mq.capture(gm, example)


@contextlib.contextmanager
def everywhere(hook):
    handle = torch_module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_global_hook_is_refused_unless_it_is_seen_to_change_nothing():
    model, x = net()
    seen = []
    with everywhere(double), pytest.raises(mq.CaptureError, match="double is registered for every module"):
        mq.capture(model)
    with everywhere(double), pytest.raises(mq.CaptureError):
        mq.capture(model, x)
    with everywhere(lambda module, args, output: seen.append(output)):
        gm = mq.capture(model, x)
        assert seen == []
        before = list(torch_module._global_forward_hooks.values())
    assert [f.__name__ for f in before] == ["<lambda>"]
    assert_same(gm, model, x)


@METHODS
def test_a_call_of_the_class_and_a_parametrization_are_in_the_graph(method):
    class Called(Net):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * 5

    class Scaled(nn.Module):
        def forward(self, weight):
            return weight * 7

    model, x = net(Called)
    assert_same(mq.capture(model, x, method=method), model, x)
    parametrize.register_parametrization(model.b, "weight", Scaled().eval())
    model.eval()
    assert_same(mq.capture(model, x, method=method), model, x)


@METHODS
@pytest.mark.parametrize("wrap", ["compile", "compile inside", "compile in place", "DataParallel"])
def test_what_is_wrapped_is_captured_as_it_would_be_without(wrap, method):
    plain, x = net()
    model, _ = net()
    if wrap == "compile inside":
        model.b = torch.compile(model.b, backend="eager")
    elif wrap == "compile in place":
        model.compile(backend="eager")
        model.b.compile(backend="eager")
    else:
        model = nn.DataParallel(model) if wrap == "DataParallel" else torch.compile(model, backend="eager")
    gm = mq.capture(model, x, method=method)
    assert_same(gm, plain, x)
    state, expected = gm.state_dict(), plain.state_dict()
    assert {name.replace("b._orig_mod.", "b.") for name in state} == set(expected)
    model(x)


def test_a_hook_on_a_wrapper_is_refused():
    model, x = net()
    model = nn.DataParallel(model)
    model.register_forward_hook(double)
    with pytest.raises(mq.CaptureError, match="the hook double hangs on this wrapper"):
        mq.capture(model, x)


# --- Frozen random numbers ---


class Noisy(Net):
    def forward(self, x):
        return super().forward(x) + self.noise(x)


NOISES = {
    "randn": lambda x: torch.randn(64),
    "rand, drawn by a helper": lambda x: torch.empty(64).uniform_() + 0.5,
    "bernoulli": lambda x: torch.bernoulli(torch.full((64,), 0.5)),
    "dropout of a constant": lambda x: F.dropout(torch.ones(64), training=True),
    "a normal distribution": lambda x: torch.distributions.Normal(0.0, 1.0).sample((64,)),
    "randperm": lambda x: torch.randperm(64).to(x.dtype),
    "rand_like of the input": lambda x: torch.rand_like(x),
    "dropout of the input": lambda x: F.dropout(x, training=True),
}


@pytest.mark.parametrize("noise", NOISES)
def test_random_numbers_stay_random_or_are_refused_at_their_line(noise):
    """torch.randn(64) in forward became a constant of the symbolic graph."""
    model, x = net(Noisy)
    model.noise = NOISES[noise]
    gm = mq.capture(model, x)
    torch.manual_seed(1)
    with torch.no_grad():
        first, second = gm(x), gm(x)
        torch.manual_seed(1)
        expected = model(x)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    if "input" not in noise:
        for method, example in (("symbolic", x), ("auto", None)):
            with pytest.raises(mq.CaptureError, match=rf"(?s){__file__}:\d+, in .*draws random numbers"):
                mq.capture(model, example, method=method)


@METHODS
def test_numbers_of_pythons_generator_are_refused(method):
    model, x = net(Noisy)
    model.noise = lambda x: random.random()
    with pytest.raises(mq.CaptureError, match=r"(?s)Python's or numpy's generator.*torch\.rand"):
        mq.capture(model, x, method=method)


def test_what_is_seeded_in_forward_is_the_same_each_time_and_may_be_a_constant():
    def noise(x):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return torch.randn(64)

    model, x = net(Noisy)
    model.noise = noise
    assert_same(mq.capture(model, x, method="symbolic"), model, x)


# --- Messages and edges ---


class Seeded(Net):
    def forward(self, x):
        torch.manual_seed(0)
        return super().forward(x) + torch.randn(self.a.out_features)


def test_what_is_seeded_in_forward_is_no_other_noise_in_an_export_whatever_the_callers_seed():
    """The graph drew anew at each call, and the check began where the model's own seed does: -0.9 dB."""
    torch.manual_seed(0)
    with pytest.raises(mq.CaptureError, match="computes something else than the model"):
        mq.capture(Seeded().eval(), torch.randn(4, 64), method="export")


class Mapped(Net):
    def forward(self, x):
        return torch.func.vmap(lambda row: super(Mapped, self).forward(row[None])[0])(x)


def test_a_transform_in_forward_is_refused_by_name():
    """A graph that failed between its calls left the process inside the transform: every later run crashed."""
    with pytest.raises(mq.CaptureError, match=r"forward calls torch\.func\.vmap or another transform"):
        mq.capture(Mapped().eval(), torch.randn(4, 64), method="export")
    assert torch._C._functorch.maybe_get_level(torch.ones(1)) == -1


def test_torchscript_is_refused_with_what_to_pass_and_kept_whole_inside_a_model():
    """It gave '_CachedForward' or "no signature found"."""
    model, x = net()
    for made in (torch.jit.script(model), torch.jit.trace(model, x)):
        with pytest.raises(mq.CaptureError, match=r"pass the nn\.Module that it was scripted or traced from"):
            mq.quantize(made, x)
    grads = [p.requires_grad for p in model.a.parameters()]
    model.a = torch.jit.script(model.a)
    result = mq.quantize(model, **OPTIONS)
    assert [p.requires_grad for p in model.a.parameters()] == grads
    assert result.info.quantized_layers == {"b": "int4 g32 sym"}
    assert [row.reason for row in result.accuracy.rows if row.scheme == "float32"] == [
        "not reachable: RecursiveScriptModule hides its weights from the graph"
    ]
    assert_same(mq.capture(model, method="symbolic"), model, x)


def test_a_lazy_module_asks_for_one_forward():
    """A raw ValueError."""
    model, x = nn.Sequential(nn.LazyLinear(64), nn.LazyBatchNorm1d()).eval(), torch.randn(4, 64)
    for call in (lambda: mq.quantize(model, x), lambda: mq.capture(model)):
        with pytest.raises(mq.CaptureError, match=r"'0\.weight' has no shape yet.*run the model on one batch first"):
            call()
    model(x)
    assert mq.quantize(model, x, **OPTIONS).info.quantized_layers


def test_a_second_quantize_says_that_it_is_one_and_dequantize_model_leads_out():
    """It said "the float graph has no weight '0.weight'"."""
    model, x = net()
    first = mq.quantize(model, x, **OPTIONS).graph_module
    for example in (None, x):
        with pytest.raises(
            mq.PreconditionError, match=r"quantized already .*'a\.weight'.*mq\.dequantize_model\(graph\)"
        ):
            mq.quantize(first, example, **OPTIONS)
    again = mq.quantize(mq.dequantize_model(first), x, **OPTIONS)
    assert again.info.quantized_layers == {"a": "int4 g32 sym", "b": "int4 g32 sym"}
    inside = mq.quantize(nn.Sequential(first, nn.Linear(64, 64)).eval(), x, **OPTIONS)
    assert inside.info.quantized_layers == {"1": "int4 g32 sym"}


class AlwaysOn(Net):
    """In eval mode these still use the batch's statistics, and drop."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64, track_running_stats=False)
        self.other = nn.InstanceNorm1d(4)

    def forward(self, x):
        x = self.other(self.norm(super().forward(x)).unflatten(-1, (4, 16))).flatten(1)
        return F.dropout(x, 0.1, training=True)


@METHODS
def test_quantize_of_a_captured_graph_takes_what_quantize_of_the_model_takes(method):
    """It was refused as "training mode"."""
    model, x = net(AlwaysOn)
    gm = mq.capture(model, x, method=method)
    names = mq.quantize(model, x, **OPTIONS).info.quantized_layers
    assert mq.quantize(gm, x, **OPTIONS).info.quantized_layers == names
    assert mq.capture(mq.quantize(gm, x, **OPTIONS).graph_module)


def test_a_program_that_was_exported_in_training_mode_is_still_refused():
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(), (torch.ones(2, 4),))
    with pytest.raises(mq.CaptureError, match="exported in training mode"):
        mq.quantize(program.module())
    model, x = net(lambda: nn.BatchNorm1d(64, track_running_stats=False))
    assert mq.capture(torch.export.export(model, (x,)).module())


@METHODS
def test_accuracy_is_measured_against_the_module_that_a_newcomer_has(method):
    """AttributeError: 'graph'."""
    model, x = net()
    gm = mq.capture(model, x, method=method)
    result = mq.quantize(gm, x, **OPTIONS)
    for data in ([x], (batch for batch in [x, x + 1]), None):
        kept = None if data is None else list(data)
        expected = mq.measure_accuracy(gm, result.graph_module, kept)
        assert str(mq.measure_accuracy(model, result.graph_module, None if data is None else iter(kept))) == str(
            expected
        )
    assert mq.measure_accuracy(model, result, [{"image": x}], prepare_batch=lambda b: b["image"]).samples == 8
    assert mq.validate_quantization(model, result, [x]) == mq.validate_quantization(gm, result.graph_module, [x])


def test_what_is_no_graph_is_refused_with_the_way_to_one():
    model, x = net()
    result = mq.quantize(model, x, **OPTIONS)
    for call in (
        lambda: mq.measure_accuracy(model, model, [x]),
        lambda: mq.validate_quantization(x, result, [x]),
        lambda: mq.format_graph(model),
        lambda: mq.diff_graphs(model, model),
        lambda: mq.dequantize_model(model),
        lambda: mq.bisect(mq.default_pipeline(), model, [x], 30.0),
        lambda: mq.draw(model),
    ):
        with pytest.raises(
            mq.PreconditionError, match=r"a GraphModule is needed, not .*; mq\.capture\(model\) makes one"
        ):
            call()
    with pytest.raises(mq.CaptureError, match=r"measure_accuracy needs the float graph, mq\.capture"):
        mq.measure_accuracy(model.train(), result, [x])
    with pytest.raises(mq.PreconditionError, match=r"what mq\.quantize returned is needed"):
        mq.save(model, "nowhere")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: mq.check_accuracy_warnings(m), mq.PreconditionError, "what mq.quantize returned is needed, not Net"),
        (lambda m: mq.history(m), mq.PreconditionError, "history: a node of a graph is needed, not Net"),
        (lambda m: mq.default_pipeline(m), mq.ConfigError, "a QuantConfig is needed, not Net"),
        (lambda m: mq.quantize_weight_int4(m.a), mq.WeightError, "a dense tensor with values is needed, not Linear"),
        (lambda m: mq.quantize_weight_int4(m.a.weight.to("meta")), mq.WeightError, "not one on meta"),
        (lambda m: mq.sqnr_db([1.0], [1.0]), mq.InputError, "two tensors of one shape are needed, not list"),
    ],
)
def test_what_a_newcomer_has_in_hand_is_answered_with_what_is_needed(call, error, words):
    """AttributeError 'graph', 'shape' and their like."""
    with pytest.raises(error, match=words):
        call(Net().eval())


def test_accuracy_is_measured_against_an_exported_program():
    model, x = net()
    result = mq.quantize(model, x, **OPTIONS)
    program = torch.export.export(model, (x,))
    table = mq.measure_accuracy(program, mq.quantize(program, **OPTIONS).graph_module, [(x,)])
    assert table.output_sqnr_db == pytest.approx(mq.sqnr_db(model(x), result.graph_module(x)), abs=0.1)

"""The user's world is as it was: attributes, hooks' lists, other threads, warnings, streams, modes around a call."""

import contextlib
import copy
import functools
import io
import logging
import random
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mono_quant_fx as mq
from tests.harness import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
OPTIONS = {"group_size": 32, "skip_param_threshold": 0}
SEEN = []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        with torch.no_grad():
            mean = x.mean()
        return self.b(self.norm(torch.relu(self.a(x)))) * 2.0 + mean


def net(kind=Net):
    torch.manual_seed(0)
    return kind().eval(), torch.randn(16, 64)


# --- A copy that fails is no licence to trace the original ---


def weight_norm(model):
    nn.utils.weight_norm(model.a)


def pruned(model):
    nn.utils.prune.l1_unstructured(model.a, "weight", 0.5)


def spectral_norm(model):
    nn.utils.spectral_norm(model.a).eval()


def locked(model):
    model.lock = threading.Lock()
    model.a.nested = {"deep": [threading.Lock()]}


class NoCopy:
    def __deepcopy__(self, memo):
        raise RuntimeError("this one is not copied")


def refusing(model):
    model.held = NoCopy()
    model.__dict__["__deepcopy__"] = NoCopy().__deepcopy__  # so that not even a copy without `held` succeeds


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")
@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("spoil", [weight_norm, pruned, spectral_norm, locked, refusing])
def test_a_model_that_cannot_be_copied_is_as_it_was_after_the_capture(spoil, method):
    """m.weight of a model with old weight_norm, prune, spectral_norm or a lock is a torch.fx Proxy afterwards."""

    class Notes(Net):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    model, x = net(Notes)
    spoil(model)
    before, attributes = Snapshot(model), [dict(vars(m)) for m in model.modules()]
    expected = model(x)
    del model.last
    attributes = [dict(vars(m)) for m in model.modules()]
    gm = mq.capture(model, x, method=method)
    before.check(model)
    assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == [
        {k: id(v) for k, v in old.items()} for old in attributes
    ]
    torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), expected)


class Recorder(Net):
    """Writes to all that a copy of the model shares with it."""

    count, log = 0, []

    def forward(self, x):
        global LAST
        type(self).count += 1
        type(self).fresh = x
        self.log.append(x)
        SEEN.append(x)
        LAST = x
        return super().forward(x)


LAST = None


@pytest.mark.parametrize("way", ["symbolic", "export", "failing", "interrupted"])
def test_what_hooks_and_forward_record_is_put_back_however_it_ends(way):
    """A hook that appends to the user's list leaves Proxies there; so do class attributes, globals and closures."""
    model, x = net(Recorder)
    kept, latest, counter = [], {"x": None}, 0

    def hook(module, args, output):
        nonlocal counter
        counter += 1
        kept.append(output)
        latest["x"] = output
        if way == "failing":
            raise ValueError("the hook's own")
        if way == "interrupted" and isinstance(output, fx.Proxy):
            raise KeyboardInterrupt

    model.a.register_forward_hook(hook)
    model.register_forward_pre_hook(lambda module, args: kept.append(args))
    error = {"failing": mq.CaptureError, "interrupted": KeyboardInterrupt}.get(way)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        mq.capture(model, x, method=way if error is None else "auto")
    assert (kept, latest, counter, SEEN, LAST, Recorder.count, Recorder.log) == ([], {"x": None}, 0, [], None, 0, [])
    assert "fresh" not in vars(Recorder)


def test_the_users_random_numbers_go_on_as_they_would():
    class Draws(Net):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x) * 0

    model, x = net(Draws)
    states = torch.get_rng_state(), random.getstate()
    mq.quantize(model, x, **OPTIONS)
    mq.capture(model, x, method="export")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


# --- Process-wide switches ---


def in_threads(*works):
    """Runs them at once; raises what any of them raised."""
    failures = []

    def guarded(work):
        try:
            work()
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_captures_in_several_threads_succeed_and_leave_the_process_as_it_was(method):
    """Two quantize() calls in two threads fail, and streams, warnings and torch's loggers stay changed for good."""
    model, x = net()
    levels = {n: logging.getLogger(n).level for n in ("torch.export", "torch._export")}
    before = sys.stdout, sys.stderr, warnings.showwarning, list(warnings.filters)
    expected = mq.format_graph(mq.capture(model, x, method=method))
    graphs = []

    def capture():
        graphs.append(mq.format_graph(mq.capture(copy.deepcopy(model), x, method=method)))

    in_threads(*[capture] * 4)
    assert graphs == [expected] * 4
    assert (sys.stdout, sys.stderr, warnings.showwarning, list(warnings.filters)) == before
    assert {n: logging.getLogger(n).level for n in levels} == levels
    assert not [f for n in levels for f in logging.getLogger(n).filters]


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_a_float_model_in_another_thread_runs_while_this_one_captures(method):
    """It raises NameError "module is not installed as a submodule", and its prints are lost."""
    model, x = net(lambda: nn.Sequential(Net(), nn.TransformerEncoderLayer(64, 4, batch_first=True)))
    other, ready, done = copy.deepcopy(model), threading.Event(), threading.Event()
    expected, out, count = other(x), io.StringIO(), 0

    def run():
        nonlocal count
        while not done.is_set():
            assert torch.equal(other(x), expected)
            assert not torch.compiler.is_compiling() and not torch.fx._symbolic_trace.is_fx_symbolic_tracing()
            print("line")
            count += 1
            ready.set()

    def capture():
        ready.wait()
        try:
            for _ in range(3):
                mq.capture(model, x, method=method)
        finally:
            done.set()

    with contextlib.redirect_stdout(out):
        in_threads(run, capture)
    assert out.getvalue() == "line\n" * count and count > 1


def test_a_compiled_model_in_another_thread_runs_while_this_one_traces():
    class Slow(Net):
        def forward(self, x):
            in_threads(lambda: torch.testing.assert_close(compiled(y), expected))
            return super().forward(x)

    model, x = net(Slow)
    other, y = net()
    compiled, expected = torch.compile(other, backend="eager"), other(x)
    compiled(y)
    mq.capture(model)


def test_notes_of_torchs_loggers_stay_off_the_screen_without_their_levels(capfd):
    class Stops(Net):
        def forward(self, x):
            logging.getLogger("torch.export").warning("told by another part of this thread")
            return super().forward(x) if x.sum() > 0 else x

    model, x = net(Stops)
    with pytest.raises(mq.CaptureError, match="data-dependent"):
        mq.capture(model, x, method="export")
    assert "def forward" not in "".join(capfd.readouterr())


# --- Warnings of the user's model ---


class Warns(Net):
    def forward(self, x):
        warnings.warn("the user's own", RuntimeWarning, stacklevel=1)
        return super().forward(x)


@pytest.mark.parametrize("call", ["capture", "quantize", "export", "no example"])
def test_the_users_warnings_pass_once_and_are_no_notes(call):
    """Everything that did not begin with "capture:" was swallowed."""
    model, x = net(Warns)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if call == "quantize":
            assert mq.quantize(model, x, **OPTIONS).warnings == []
        else:
            method = "export" if call == "export" else "auto"
            mq.capture(model, None if call == "no example" else x, method=method)
    told = [(str(w.message), w.filename) for w in heard if "the model fixes" not in str(w.message)]
    assert told == [("the user's own", __file__)]


def test_a_warning_made_an_error_is_the_models_own_failure():
    model, x = net(Warns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(mq.CaptureError, match="RuntimeWarning: the user's own"):
            mq.capture(model, x)
        warnings.filterwarnings("ignore", "capture: the model fixes")
        mq.capture(nn.GRU(64, 64).eval(), x)


def test_a_warning_of_the_user_that_looks_like_a_note_is_none():
    class Sly(Net):
        def forward(self, x):
            warnings.warn("capture: not ours", stacklevel=1)
            return super().forward(x)

    model, x = net(Sly)
    with pytest.warns(UserWarning, match="not ours"):
        assert mq.quantize(model, x, **OPTIONS).warnings == []


# --- Ambient modes ---


class Biased(TorchFunctionMode):
    """Adds one to what torch.round gives, which nobody asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + 1 if func in (torch.round, torch.Tensor.round_, torch.Tensor.round) else result


class BiasedOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + 1 if func is torch.ops.aten.round.default else result


@contextlib.contextmanager
def switched(switch, on, off):
    switch(on)
    try:
        yield
    finally:
        switch(off)


MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "meta by default": lambda: switched(torch.set_default_device, "meta", None),
    "with meta": lambda: torch.device("meta"),
    "a function mode": Biased,
    "a dispatch mode": BiasedOps,
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}
INT8 = {"activations": "int8", "bits": 8, "bias_correction": True, "observer": "histogram"}


#: A way to a graph, and the options it is quantized with.
ROUNDS = [("symbolic", INT8), ("symbolic", {"algorithm": "gptq"}), ("export", {"algorithm": "clip"})]


def quantized(model, x, method, options):
    gm = mq.capture(model, x, method=method)
    result = mq.quantize(gm, calibration_data=[x], **OPTIONS, **options)
    table = mq.measure_accuracy(gm, result.graph_module, [x], all_nodes=True)
    return result.graph_module, [str(result.accuracy), str(table), mq.format_graph(result.graph_module)]


@functools.cache
def plain_results():
    return [quantized(*net(), *one) for one in ROUNDS]


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_whatever_is_switched_on_around_a_call_the_bits_are_the_same(mode):
    """Inside autocast: PassError "self and mat2 must have the same dtype", or silently other codes; and so on."""
    for one, (expected, texts) in zip(ROUNDS, plain_results(), strict=True):
        model, x = net()
        with MODES[mode]():
            gm, said = quantized(model, x, *one)
        assert said == texts
        state, wanted = gm.state_dict(), expected.state_dict()
        assert {k: (v.dtype, v.device) for k, v in state.items()} == {k: (v.dtype, v.device) for k, v in wanted.items()}
        assert all(torch.equal(state[k], wanted[k]) for k in wanted)
        assert torch.equal(gm(x), expected(x))


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_is_on_again_afterwards_and_loading_does_not_feel_it(mode, tmp_path):
    model, x = net()
    expected = mq.quantize(model, x, **OPTIONS).graph_module(x)
    probes = torch.zeros(2).device, torch.zeros(2).dtype
    with MODES[mode]():
        inside = probe()
        mq.quantize(model, x, **OPTIONS).save(tmp_path / "m.safetensors", graph=True)
        loaded = [mq.load(tmp_path / "m.safetensors", m) for m in (None, model)]
        assert probe() == inside
        with pytest.raises(mq.CaptureError):
            mq.capture(nn.Dropout().train())
        assert probe() == inside
    assert (torch.zeros(2).device, torch.zeros(2).dtype) == probes
    assert all(torch.equal(one.graph_module(x), expected) for one in loaded)


def probe():
    """What the modes of MODES show of themselves."""
    return (
        torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
        torch.zeros(2).device, torch.zeros(2).dtype, torch.round(torch.zeros(2)).tolist() if not torch.zeros(2).is_meta
        else None, torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(),
    )  # fmt: skip


def test_a_default_device_on_which_the_model_lies_stays():
    with torch.device("meta"):
        model = Net().eval()
        gm = mq.capture(model)
    assert all(t.is_meta for t in gm.state_dict().values())


def test_a_model_and_data_made_in_inference_mode_are_quantized():
    model, x = net()
    expected = mq.quantize(model, calibration_data=[x], **OPTIONS)
    with torch.inference_mode():
        made, y = copy.deepcopy(model), x.clone()
        result = mq.quantize(made, calibration_data=[y], **OPTIONS)
        exported = mq.capture(made, y, method="export")
    assert str(result.accuracy) == str(expected.accuracy)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x))

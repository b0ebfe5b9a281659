"""A stored graph reaches no memory but its own: it calls what a list names, with arguments that are looked at."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys

import pytest
import torch
from torch import fx, nn

import mono_quant_fx as mq
from mono_quant_fx.cli.main import main
from mono_quant_fx.files.reader import TensorFile, write_tensors
from mono_quant_fx.storage.graph_json import calls
from mono_quant_fx.storage.graph_json.checked_calls import CHECKED
from mono_quant_fx.storage.graph_json.document import graph_from_json, graph_to_json
from mono_quant_fx.storage.saving import KEY
from tests import graph_fuzz


def called(target: str, *args: object, op: str = "call_function", **kwargs: object) -> dict[str, object]:
    """A stored graph with one call, x -> target(x, ...)."""
    node = {"name": "bad", "op": op, "target": target, "args": [{"node": "x"}, *args], "kwargs": kwargs}
    nodes = [
        {"name": "x", "op": "placeholder", "target": "x"},
        node,
        {"name": "output", "op": "output", "args": [{"node": "bad"}]},
    ]
    return {
        "format": "mono_quant_fx graph", "version": 1, "tensors": {}, "tied": {}, "stacks": [], "traces": [],
        "steps": [], "graph": {"nodes": nodes, "modules": {}, "codegen": None},
    }  # fmt: skip


X = {"node": "x"}
#: Each of these read or wrote outside of its tensors, gave out memory as it was left, or ended the process.
HOSTILE = {
    "sizes past the storage": called("aten._reshape_alias.default", [1 << 20], [1]),
    "strides on trust": called("aten.as_strided.default", [4, 4], [100, 1]),
    "a method with strides": called("as_strided", [4, 4], [100, 1], op="call_method"),
    "a function with strides": called("torch.as_strided", [4, 4], [100, 1]),
    "another storage": called("aten.set_.source_Tensor", X),
    "another size": called("aten.resize_.default", [1 << 20]),
    "another shape in place": called("aten.t_.default"),
    "segments": called("aten.segment_reduce.default", "max", unsafe=True, lengths=X),
    "unchecked norms": called("aten._weight_norm_interface.default", X, 0),
    "a norm that calls them": called("aten._weight_norm.default", X, 0),
    "a kernel of attention": called("aten._scaled_dot_product_flash_attention_for_cpu.default", X, X),
    "a loss by index": called("aten.ctc_loss.Tensor", X, X, X),
    "bags by offset": called("aten._embedding_bag.default", X, X),
    "an inner norm": called("aten.native_batch_norm.default", X, X, X, X, True, 0.5, 0.5),
    "an inner transform": called("aten._fft_r2c.default", [-1, -2], -3, True),
    "unpooling": called("torch.nn.functional.max_unpool2d", X, 2),
    "memory as it was left": called("aten.empty_like.default"),
    "new memory as it was left": called("torch.empty", 4),
    "a type by number": called("aten.zeros_like.default", dtype=-1),
    "a memory format by number": called("aten.zeros_like.default", memory_format=4),
    "a memory format by position": called("aten.to.dtype", {"dtype": "float16"}, False, False, 4),
    "a mode by number": called("aten.mse_loss.default", X, 1 << 62),
    "bytes as another type": called("aten.view.dtype", {"dtype": "bool"}),
    "a method for it": called("view", {"dtype": "bool"}, op="call_method"),
    "a type without a quantizer": called("aten.zeros_like.default", dtype={"dtype": "qint32"}),
    "a sparse layout": called("torch.zeros_like", layout={"layout": "sparse_coo"}),
    "an output that is passed in": called("torch.add", X, out=X),
    "more arguments than there are": called("aten.relu.default", X, X),
    "an operator without a look": called("aten._foo.default"),
    "sizes and scales that contradict": called("aten.upsample_trilinear3d.default", [4, 2, 1], False, 1e-30, 0.0, None),
    "recurrence over no batches": called("aten.gru.data", X, X, [X, X, X, X], True, 1, 0.0, False, False),
    "padding that overflows": called("aten.conv3d.default", X, None, [1, 1, 1], [1 << 61, 1, 0]),
    "padding that overflows in a function": called("torch.nn.functional.conv2d", X, padding=[1 << 61, 1]),
    "padding that is reckoned": called("torch.conv2d", X, None, 1, X),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_call_that_trusts_its_arguments_is_refused_by_load(name):
    """All of aten was allowed but for some names: a file read and wrote past its tensors, or crashed the process."""
    with pytest.raises(mq.GraphFormatError, match="node 'bad'"):
        graph_from_json(HOSTILE[name], {})


@pytest.mark.parametrize(
    ("target", "way_out"),
    [
        (torch.ops.aten._weight_norm.default, "remove_parametrizations"),
        (torch.ops.aten.empty_like.default, "zeros"),
        (torch.ops.aten.as_strided.default, "unfold or slices"),
        (torch.ops.aten.segment_reduce.default, "save without graph=True"),
    ],
)
def test_save_names_node_operator_and_way_out(target, way_out, tmp_path):
    """What load would refuse was written all the same."""
    new = fx.Graph()
    new.output(new.create_node("call_function", target, (new.placeholder("x"),), name="strange"))
    gm = fx.GraphModule(nn.Module(), new).eval()
    with pytest.raises(mq.NotSelfContainedError, match=rf"node 'strange': it calls {target}.*{way_out}"):
        graph_to_json(gm)


def test_every_operator_on_the_list_exists_and_none_writes_to_an_output():
    operators = calls.allowed_operators()
    assert len(operators) > 500 and all(not a.is_out for op in operators for a in op._schema.arguments)
    for op in operators:
        name = op._schema.name.partition("::")[2]
        assert "strided" not in name and "resize" not in name and "unsafe" not in name and "backward" not in name
        assert "empty" not in name and not name.startswith(("set_", "_embedding", "_fft", "_thnn", "_scaled"))
        assert calls.function_of(str(op)) in (op, CHECKED.get(str(op)))
        assert calls.function_name(op) == calls.function_name(calls.function_of(str(op))) == str(op)


def test_verify_judges_a_graph_as_load_does(tmp_path, capsys):
    """The command said "all good" of a file whose graph was a write outside of its tensors."""
    path = tmp_path / "m.safetensors"
    mq.quantize(nn.Sequential(nn.Linear(64, 32)).eval(), group_size=32).save(path, graph=True)
    assert main(["verify", str(path)]) == 0
    with TensorFile(path) as file:
        about = json.loads(file.metadata[KEY])
        tensors = {name: file.read(name) for name in file.entries}
    nodes = about["graph"]["graph"]["nodes"]
    nodes[-1:-1] = [{"name": "bad", "op": "call_function", "target": "aten._reshape_alias.default",
                     "args": [{"node": nodes[-2]["name"]}, [1 << 20], [1]]}]  # fmt: skip
    write_tensors(path, tensors, {"format": "pt", KEY: json.dumps(about)})
    capsys.readouterr()
    assert main(["verify", str(path)]) == 2
    printed = capsys.readouterr().out
    assert "'graph' cannot be loaded: node 'bad': it calls 'aten._reshape_alias.default'" in printed
    with pytest.raises(mq.GraphFormatError, match="_reshape_alias"):
        mq.load(path)


HUGE = {
    "aten.max_pool1d.default": [[(1 << 63) - 8]],
    "torch.max_pool1d": [100, 2, 0, (1 << 63) - 8],
    "torch.nn.functional.max_pool1d": [(1 << 63) - 8],
    "torch.nn.functional.lp_pool1d": [{"float": "inf"}, 3037000500, (1 << 63) - 8],
    "torch.nn.functional.fold": [[8, 8], [2, 2], 1, [1 << 32, 0], 2],
    "aten.col2im.default": [[8, 8], [2, 2], [1, 1], [1 << 32, 0], [2, 2]],
}


@pytest.mark.parametrize("target", HUGE)
def test_sizes_of_windows_are_looked_at_when_the_graph_runs(target):
    """SIGSEGV, where a size overflowed as the kernel reckoned with it."""
    gm = graph_from_json(called(target, *HUGE[target]), {})
    with pytest.raises(mq.GraphFormatError, match="sizes of windows are at most 2147483647"):
        gm(torch.randn(1, 8, 16))
    with pytest.raises(mq.GraphFormatError, match="at most 2147483647"):
        copy.deepcopy(gm)(torch.randn(1, 8, 16))
    assert graph_to_json(gm)["graph"]["nodes"][1]["target"] == target
    data = graph_to_json(mq.capture(nn.Sequential(nn.MaxPool1d(2)).eval()))
    data["graph"]["modules"]["0"]["args"]["kernel_size"] = (1 << 63) - 8
    with pytest.raises(mq.GraphFormatError, match="no number is above 2147483647"):
        graph_from_json(data, {})


class Recurrent(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, **options)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize("options", [{"batch_first": True}, {"num_layers": 2, "bidirectional": True, "bias": False},
                                     {"proj_size": 2, "num_layers": 2}])  # fmt: skip
def test_an_exported_lstm_is_stored_and_reads_no_weights_of_other_sizes(options):
    """aten.lstm read and wrote past its tensors where states, weights and input did not fit each other."""
    x = torch.randn(5, 2, 4)
    gm = mq.capture(Recurrent(**options).eval(), x, method="export")
    data, tensors = json.loads(json.dumps(graph_to_json(gm))), dict(gm.state_dict())
    back = graph_from_json(data, tensors)
    torch.testing.assert_close(back(x), gm(x))
    assert any(node.target is CHECKED["aten.lstm.input"] for node in back.graph.nodes)
    assert graph_to_json(back) == data
    with pytest.raises(mq.GraphFormatError, match="its states and weights are"):
        graph_from_json(called("aten.lstm.input", [X, X], [X, X, X, X], True, 1, 0.0, False, False, False), {})(x)
    name = "lstm.weight_hh_l0"
    for bad in (torch.zeros(2, 3), tensors[name].double()):
        data["tensors"][name].update(shape=list(bad.shape), dtype=str(bad.dtype)[6:])
        with pytest.raises(mq.GraphFormatError, match="its states and weights"):
            graph_from_json(data, {**tensors, name: bad})(x)


def test_an_argument_out_that_is_none_is_no_output():
    """F.normalize and others have it written down as None."""
    gm = graph_from_json(called("torch.nn.functional.normalize", out=None), {})
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), torch.nn.functional.normalize(x))


class Writes(nn.Module):
    """What capture turns into functions: into an item, a piece, a diagonal and windows."""

    def forward(self, x):
        x = x.clone()
        x[:, :2] = 1.0
        x.chunk(2, -1)[0].add_(1)
        x.diagonal().fill_(0)
        x.unfold(1, 4, 4).mul_(2)
        return x


def test_writes_into_parts_are_stored():
    x = torch.randn(4, 8)
    gm = mq.capture(nn.Sequential(nn.Linear(8, 8), Writes()).eval(), x, method="symbolic")
    data = json.loads(json.dumps(graph_to_json(gm)))
    assert torch.equal(graph_from_json(data, gm.state_dict())(x), gm(x))
    through = next(m["through"] for m in data["graph"]["modules"].values() if "through" in m)
    for bad in (
        {"method": "as_strided"},
        {"method": "view"},
        {"function": "aten.as_strided.default"},
        {},
        {"method": 3},
    ):
        through.clear()
        through.update(bad)
        with pytest.raises(mq.GraphFormatError):
            graph_from_json(data, gm.state_dict())


def test_sizes_beyond_any_memory_are_an_error_and_no_crash():
    gm = graph_from_json(called("aten.expand.default", [10**15, 4]), {})
    with pytest.raises((RuntimeError, MemoryError)):
        gm(torch.ones(1, 4)).contiguous()


def check(report: graph_fuzz.Report, count: int) -> None:
    assert not report.crashed, f"seeds that ended a process, with its exit code: {report.crashed}"
    assert not report.leaked, f"seeds whose output is memory as it was left: {report.leaked}"
    assert len(report.slow) <= count / 100, f"seeds that took more than {graph_fuzz.PATIENCE} s: {report.slow}"
    assert sum(report.counts.values()) + len(report.slow) == count
    assert report.counts["ran"] > count / 20 and report.counts["raised"] > count / 20, report.counts


def test_some_mutated_graphs_end_no_process(tmp_path):
    check(graph_fuzz.fuzz(0, 60, graph_fuzz.guard(tmp_path)), 60)


@pytest.mark.slow
def test_two_thousand_mutated_graphs_end_no_process(tmp_path):
    check(graph_fuzz.fuzz(1000, 3000, graph_fuzz.guard(tmp_path)), 2000)


@pytest.mark.slow
def test_the_guard_sees_one_element_past_the_end(tmp_path):
    """That no mutant crashed says something only if a crash would be seen."""
    library = graph_fuzz.guard(tmp_path)
    if library is None:
        pytest.skip("a C compiler is missing: apt install gcc")
    code = "import torch; torch.ops.aten._reshape_alias(torch.ones(16), [{}], [1]).sum(); print('read')"
    for size, ended in ((16, 0), (17, -signal.SIGSEGV)):
        command = [sys.executable, "-W", "ignore", "-c", code.format(size)]
        done = subprocess.run(command, env=graph_fuzz.environment(library), capture_output=True, text=True)
        assert done.returncode == ended, done.stderr


class Padded(nn.Module):
    def forward(self, x):
        return torch.nn.functional.conv1d(x, torch.ones(1, 4, 3), padding=x.shape[2] // 4)


def test_what_load_would_refuse_is_not_saved():
    """A window that is computed: the file was written, and could not be read."""
    gm = mq.capture(Padded().eval(), method="symbolic")
    with pytest.raises(mq.NotSelfContainedError, match="conv1d, and its window is"):
        graph_to_json(gm)

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

import mono_quant_fx as mq
from tests.harness import Snapshot, check_pass
from tests.models import MLP, ConvNet


@dataclass(frozen=True)
class ReluToTanh(mq.Pass):
    """Replaces F.relu by torch.tanh."""

    name: ClassVar[str] = "relu-to-tanh"

    def rewrite(self, gm):
        for node in gm.graph.find_nodes(op="call_function", target=nn.functional.relu):
            node.target, node.kwargs = torch.tanh, {}

    def ensures(self, gm):
        return "a relu is left" if gm.graph.find_nodes(op="call_function", target=nn.functional.relu) else None


@dataclass(frozen=True)
class Note(mq.Pass):
    """Writes a note on every linear."""

    text: str = "seen"
    name: ClassVar[str] = "note"

    def rewrite(self, gm):
        for node in gm.graph.find_nodes(op="call_function", target=nn.functional.linear):
            node.meta["note"] = {"text": self.text}


@dataclass(frozen=True)
class Broken(mq.Pass):
    """Fails in one of its hooks."""

    where: str = "rewrite"
    name: ClassVar[str] = "broken"

    def requires(self, gm):
        return "it is the wrong stage; run something else first" if self.where == "requires" else None

    def rewrite(self, gm):
        next(iter(gm.graph.nodes)).meta["dirt"] = 1
        if self.where == "rewrite":
            raise KeyError("lost")

    def ensures(self, gm):
        return "it is not as promised" if self.where == "ensures" else None


def test_the_contract_holds_for_a_users_pass():
    after = check_pass(ReluToTanh(), mq.capture(MLP().eval()), args=(torch.randn(2, 64),), tolerance=None)
    assert "tanh" in mq.format_graph(after)
    check_pass(ReluToTanh(), after, modified=False, args=(torch.randn(2, 64),))


def test_a_change_of_meta_counts_as_a_change_and_the_same_note_does_not():
    gm = mq.capture(MLP().eval())
    noted = check_pass(Note(), gm)
    assert not Note()(noted).modified
    assert Note("again")(noted).modified


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        ("requires", mq.PreconditionError, "broken: it is the wrong stage; run something else first"),
        ("rewrite", mq.PassError, "broken: KeyError: 'lost'"),
        ("ensures", mq.PostconditionError, "broken: it is not as promised"),
    ],
)
def test_a_failing_hook_names_the_pass_and_leaves_the_graph_alone(where, error, words):
    gm = mq.capture(MLP().eval())
    before = Snapshot(gm)
    with pytest.raises(error, match=words) as caught:
        Broken(where)(gm)
    before.check(gm)
    if where == "rewrite":
        assert isinstance(caught.value.__cause__, KeyError)


def test_a_module_that_is_no_graph_is_refused_with_the_way_out():
    with pytest.raises(mq.PreconditionError, match=r"note: a GraphModule is needed, not MLP; mq.capture\(model\)"):
        Note()(MLP())


def test_passes_chain_as_functions_and_report_their_own_change():
    gm = mq.capture(MLP().eval())
    result = Note()(ReluToTanh()(gm))
    assert result.modified
    assert not ReluToTanh()(result).modified


def test_a_pipeline_runs_in_order_and_calls_back():
    gm, seen = mq.capture(MLP().eval()), []
    pipeline = mq.Pipeline((Note(), ReluToTanh(), Note()), lambda *call: seen.append(call))
    out = pipeline(gm)
    assert out.modified
    assert [(p.name, r.modified) for p, _, r in seen] == [("note", True), ("relu-to-tanh", True), ("note", False)]
    assert seen[0][1] is gm
    assert seen[2][1] is seen[1][2].graph_module
    assert pipeline(out) == mq.PassResult(out.graph_module, False)


def test_passes_and_pipelines_print_their_own_configuration():
    text = repr(mq.Pipeline((mq.passes.ObserverInsertion(), mq.passes.Int4GroupwiseLowering())))
    assert text == "Pipeline(passes=(ObserverInsertion(observer='minmax', options=()), Int4GroupwiseLowering()))"
    with pytest.raises(AttributeError):
        Note().text = "other"


def test_something_that_is_no_pass_is_refused():
    with pytest.raises(mq.ConfigError, match="is no pass; pass instances such as DequantFusion"):
        mq.Pipeline((Note,))


def test_dead_constants_go_and_a_users_calls_stay():
    class SideEffect(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("unused", torch.zeros(1))

        def forward(self, x):
            y = torch.relu(x)
            y.add_(1.0)
            return self.fc(y)

    model, x, seen = SideEffect().eval(), torch.randn(2, 64), []

    def note_down(value):  # its result is unused, its effect is not
        seen.append(value)

    gm = mq.capture(model)
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(note_down, (gm.graph.output_node().args[0],))
    gm.recompile()
    result = check_pass(Note(), gm, args=(x,))
    assert "note_down" in mq.format_graph(result) and seen
    assert torch.equal(result(x), model(x))
    assert "unused" not in result.state_dict()


def test_meta_of_every_node_and_of_the_module_survives():
    gm = mq.capture(ConvNet().eval())
    gm.meta["mine"] = 1
    for i, node in enumerate(gm.graph.nodes):
        node.meta["number"] = i
    config = mq.QuantConfig(group_size=32, skip_param_threshold=0)
    out = mq.default_pipeline(config, [torch.randn(1, 3, 8, 8)])(gm).graph_module
    assert out.meta["mine"] == 1
    numbers = {n.name: n.meta["number"] for n in gm.graph.nodes}
    for node in out.graph.nodes:
        if node.name in numbers:
            assert node.meta["number"] == numbers[node.name]
    output = next(iter(out.graph.find_nodes(op="output")))
    assert output.meta["number"] == len(numbers) - 1


def test_the_result_can_be_copied_and_pickled_state_loads():
    out = mq.default_pipeline(mq.QuantConfig(group_size=32))(mq.capture(MLP().eval())).graph_module
    twin, x = copy.deepcopy(out), torch.randn(2, 64)
    twin.load_state_dict(out.state_dict())
    assert torch.equal(twin(x), out(x))
    assert isinstance(twin, fx.GraphModule)


class TestAPipelineIsChangedByName:
    def test_passes_are_put_in_replaced_and_left_out(self):
        def names(pipeline):
            return [item.name for item in pipeline.passes]

        pipeline = mq.default_pipeline()
        before = names(pipeline)
        own = mq.passes.DequantFusion("float32")
        assert names(pipeline.insert_before("int4-lowering", own, own))[1:3] == ["dequant-fusion"] * 2
        assert pipeline.replace("dequant-fusion", own).passes[2] is own
        assert names(pipeline.without("linear-merging")) == before[:-1]
        assert names(pipeline) == before

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                lambda p: p.without("fusion"),
                "'fusion': none of its passes is called that; they are skip-annotation, int4",
            ),
            (lambda p: p.insert_after("int4-lowering", *p.passes).without("int4-lowering"), "2 of its passes"),
            (lambda p: p.insert_after("int4-lowering", "mine"), "'mine' is no pass"),
        ],
    )
    def test_what_cannot_be_is_a_config_error(self, change, words):
        with pytest.raises(mq.ConfigError, match=words):
            change(mq.default_pipeline())

    @pytest.mark.parametrize(
        "extra", [{"behind int4-lowering": mq.passes.DequantFusion()}, {3: mq.passes.DequantFusion()}]
    )
    def test_quantize_wants_a_place_it_knows(self, extra):
        with pytest.raises(
            mq.ConfigError, match="is not 'after NAME' or 'before NAME'; names are skip-annotation, int4"
        ):
            mq.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), group_size=32, extra_passes=extra)

"""Names of modules and tensors that torch.fx cannot write: plain in the graph, the user's own everywhere else."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph.own_names import is_taken, plain_names, spoken

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
OPTIONS = {"group_size": 32, "skip_param_threshold": 0}
METHODS = pytest.mark.parametrize("method", ["symbolic", "export"])
NAMES = [
    "class", "None", "a b", "it's", 'say "x"', "back\\slash", "new\nline", "%s", "{x}",
    "\ufb01", "gr\u00f6\u00dfe", "\u65e5\u672c",
]  # fmt: skip
#: What a GraphModule has itself, or what the code of a graph calls something else by.
OWN = ["graph", "code", "meta", "_graph", "recompile", "print_readable", "_guards_fn", "_out_spec", "self"]


class Odd(nn.Module):
    """A linear at the root, one in a container, and a parameter, all of that name."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(64, 64))
        self.inner = nn.ModuleDict({name: nn.Linear(64, 64)})
        self.holder = nn.Module()
        self.holder.register_parameter(name, nn.Parameter(torch.randn(64, 64) / 8))
        self.plain = nn.Linear(64, 64)

    def forward(self, x):
        x = self.inner[self.name](getattr(self, self.name)(x))
        return self.plain(x) + x @ getattr(self.holder, self.name)


@pytest.mark.parametrize(
    ("name", "method"), [*((n, "symbolic") for n in [*NAMES, *OWN[:4]]), *((n, "export") for n in [*NAMES[:6:2], *OWN])]
)
def test_a_model_with_odd_names_is_quantized_saved_and_loaded_under_its_own(name, method, tmp_path):
    """SyntaxError at the user's forward; a file that cannot be read back."""
    torch.manual_seed(0)
    model, x = Odd(name).eval(), torch.randn(4, 64)
    before = model.state_dict()
    gm = mq.capture(model, x, method=method)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
    result = mq.quantize(gm, x, modules_to_not_convert=[f"inner.{name}"], **OPTIONS)
    assert {row.weight for row in result.accuracy.rows} == {n for n, t in before.items() if t.dim() == 2}
    assert set(result.info.quantized_layers) == {name, "holder", "plain"}
    assert set(result.info.skipped_layers) == {f"inner.{name}"}
    assert mq.explain(result, name).chapters[0].title == f"{name}.weight"
    result.save(tmp_path / "m.safetensors", graph=True)
    for given_model in (None, model):
        loaded = mq.load(tmp_path / "m.safetensors", given_model)
        assert torch.equal(loaded.graph_module(x), result.graph_module(x))
        assert str(loaded.accuracy) == str(result.accuracy)
    assert {n: id(t) for n, t in model.state_dict().items()}.keys() == before.keys()


@METHODS
def test_folders_for_others_have_the_users_names(method, tmp_path):
    torch.manual_seed(0)
    model, x = Odd("class").eval(), torch.randn(4, 64)
    gm = mq.capture(model, x, method=method)
    result = mq.quantize(gm, x, modules_to_not_convert=["re:.*holder.*", "inner.class"], **OPTIONS)
    mq.export_compressed_tensors(result, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {"class.weight_packed", "inner.class.weight", "holder.class", "plain.weight_scale"} <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["inner.class", "holder"]
    back = mq.import_compressed_tensors(tmp_path / "out", model, x)
    assert torch.equal(back(x), result.graph_module(x))
    (tmp_path / "float").mkdir()
    save_file(model.state_dict(), tmp_path / "float" / "model.safetensors")
    mq.quantize_checkpoint(tmp_path / "float", model, tmp_path / "q.safetensors", example_inputs=x, **OPTIONS)
    assert mq.load(tmp_path / "q.safetensors", model).graph_module(x).shape == x.shape


def test_ordinary_models_keep_every_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"a-b": nn.Linear(8, 8)}))
    names = [*dict(model.named_modules()), *model.state_dict()]
    assert plain_names([n for n in names if n]) == {}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([*NAMES, *OWN, "a", "a_b", "class_", "name"]), min_size=1, max_size=3), max_size=8
    )
)
def test_plain_names_can_be_written_and_stay_apart(paths):
    names = [".".join(path) for path in paths]
    plain = plain_names(names)
    new = {name: plain.get(name, name) for name in names}
    assert len(set(new.values())) == len(set(names)), "two names became one"
    for own, name in new.items():
        parts = name.split(".")
        assert all(spoken(p) and not is_taken(p, at_root=not i) for i, p in enumerate(parts))
        for i in range(1, len(parts)):
            prefix = ".".join(own.split(".")[:i])
            assert plain.get(prefix, prefix) == ".".join(parts[:i]), "a module's name is one"

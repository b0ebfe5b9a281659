"""save and load of whole models: Hugging Face's from tiny configs, and those with real weights."""

import copy
import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import mono_quant_fx as mq
from tests import hf_models
from tests.test_storage import assert_same

REAL = ("minilm", "smollm2", "effnet_lite0", "g2p_gru")
#: Another process builds the skeleton from the class alone, loads, and compares.
FRESH = """
import importlib, sys, torch
import mono_quant_fx as mq
from torch.utils import _pytree as pytree
torch.use_deterministic_algorithms(True, warn_only=True)
name, folder = sys.argv[1:]
example, expected = torch.load(f"{folder}/example.pt", weights_only=True)
models = [None] if name == "file" else [importlib.import_module(f"tests.real_models.{name}").load().to("meta")]
for model in models:
    gm = mq.load(f"{folder}/m.safetensors", model).graph_module
    with torch.no_grad():
        found = [t for t in pytree.tree_leaves(gm(*example)) if isinstance(t, torch.Tensor)]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
print("same")
"""


@pytest.fixture
def same_kernels():
    """Which kernel multiplies follows from sizes alone, in this process as in the other, and not from timing."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def leaves(value) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("name", hf_models.NAMES)
def test_hugging_face_models_load_into_a_skeleton_without_values(name, tmp_path):
    model, example = hf_models.build(name), hf_models.inputs(name, 1, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = mq.quantize(model, example, group_size=16, skip_param_threshold=64, accuracy_warning="ignore")
        result.save(tmp_path / "m.safetensors")
        again = mq.load(tmp_path / "m.safetensors", copy.deepcopy(model).to("meta"))
    assert_same(again, result, hf_models.inputs(name, 3, 9 if name in hf_models.FIXED_LENGTH else 6))


TEN = ("bert", "distilbert", "gpt2", "llama", "qwen2", "gemma2", "phi3", "vit", "mamba", "t5")
FRESH_TEN = """
import sys, torch
import mono_quant_fx as mq
from torch.utils import _pytree as pytree
from tests import hf_models
torch.use_deterministic_algorithms(True, warn_only=True)
folder, *names = sys.argv[1:]
for name in names:
    example, expected = torch.load(f"{folder}/{name}.pt", weights_only=True)
    gm = mq.load(f"{folder}/{name}.safetensors", hf_models.build(name).to("meta")).graph_module
    with torch.no_grad():
        found = [t for t in pytree.tree_leaves(gm(**example)) if isinstance(t, torch.Tensor)]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected)), name
print("same")
"""


@pytest.mark.slow
def test_ten_hugging_face_models_are_the_same_in_a_fresh_process(tmp_path, same_kernels):
    for name in TEN:
        model, example = hf_models.build(name), hf_models.inputs(name, 1, 9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = mq.quantize(model, example, group_size=16, skip_param_threshold=64, accuracy_warning="ignore")
        result.save(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            torch.save((example, leaves(result.graph_module(**example))), tmp_path / f"{name}.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH_TEN, str(tmp_path), *TEN],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.endswith("same\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_are_the_same_in_a_fresh_process(name, tmp_path, same_kernels):
    module = importlib.import_module(f"tests.real_models.{name}")
    example = module.calibration()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = mq.quantize(module.load(), example, accuracy_warning="ignore")
    with torch.no_grad():
        torch.save((example, leaves(result.graph_module(*example))), tmp_path / "example.pt")
    for source, has_graph in ((name, False), ("file", True)):
        result.save(tmp_path / "m.safetensors", graph=has_graph)
        stored = sum(t.nbytes for t in result.graph_module.state_dict().values())
        if name in ("minilm", "smollm2") and not has_graph:
            assert os.path.getsize(tmp_path / "m.safetensors") < 1.02 * stored
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", FRESH, source, str(tmp_path)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.stdout.endswith("same\n"), done.stderr

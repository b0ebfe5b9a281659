"""Exported folders, read by the packages that the format belongs to: compressed-tensors and transformers."""

import json
import logging

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle import apply as ct_apply
from compressed_tensors.utils.match import match_named_modules, match_targets
from safetensors.torch import load_file

import mono_quant_fx as mq
from tests import hf_models

#: The same weights bit for bit; our op sums tile by tile, and transformers runs the eager model.
TOLERANCE = 1e-4
#: name -> settings of quantize for a model whose rows are 64 and 128 wide
SETTINGS = {
    "g32": {"group_size": 32},
    "g128": {"group_size": 128, "small_layer": "shrink"},
    "channel": {"group_size": -1},
    "int8": {"bits": 8},
    "mixed": {"group_size": 32, "overrides": {"mlp.down_proj": "int8", "re:.*0.*o_proj": "int4 channel"}},
    "skips": {"group_size": 32, "modules_to_not_convert": ["mlp.up_proj"], "skip_layer_names": ["re:.*1.*q_proj.*"]},
}
#: With zero points: transformers 5.23 builds its modules without packing these, so it loads them dequantized only.
ASYMMETRIC = {
    "g64 asym": {"group_size": 64, "symmetric": False},
    "channel asym": {"group_size": -1, "symmetric": False},
}
#: What transformers loads in no way; the package alone does.
PACKAGE = {
    "int8 asym": {"bits": 8, "symmetric": False},
    "g128 asym": {"group_size": 128, "symmetric": False, "small_layer": "shrink"},
    "mixed asym": {"group_size": 32, "overrides": {"mlp.down_proj": "int8 asym", "re:.*0.*o_proj": "int4 g64 asym"}},
    "embeddings": {"group_size": 32, "default_skips": False, "overrides": {"re:.*norm.*": "skip"}},
}
EVERY = {**SETTINGS, **ASYMMETRIC, **PACKAGE}
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def build(name, tie=False, dtype=torch.float32):
    model, config, fields, _ = hf_models._MODELS[name]
    torch.manual_seed(0)
    made = config(**{**fields, **SIZES, "tie_word_embeddings": tie, "dtype": dtype})
    made.use_cache = False
    return model(made).to(dtype).eval()


def exported(name, folder, settings, shard_bytes=5 * 10**9, **kind):
    """A model, its quantized graph, and the folder with both configs."""
    model = build(name, **kind)
    model.config.save_pretrained(folder)
    result = mq.quantize(model, hf_models.inputs(name, 1, 9), skip_param_threshold=0, **settings)
    mq.export_compressed_tensors(result, folder, shard_bytes=shard_bytes)
    return model, result


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def decompressed(model, folder):
    """Weight by module, as the package sees the folder: its own matching, its own compressor."""
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    schemes = {t: s for s in config.config_groups.values() for t in s.targets}
    stored, found = tensors(folder), {}
    for name, module in match_named_modules(model, schemes, config.ignore):
        scheme = ct_apply._scheme_from_targets(schemes, match_targets(name, module, schemes), name)
        own = {k[len(name) + 1 :]: v for k, v in stored.items() if k.rpartition(".")[0] == name}
        found[name] = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)["weight"]
    return found


def load(folder, **options):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not info["unexpected_keys"] and not info["missing_keys"] and not info["mismatched_keys"], info
    model.config.use_cache = False
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY.keys())
def test_the_package_decompresses_to_our_weights(settings, dtype, tmp_path):
    model, result = exported("llama", tmp_path, settings, dtype=dtype)
    theirs, ours = decompressed(model, tmp_path), mq.dequantize_model(result.graph_module).state_dict()
    assert sorted(theirs) == sorted(result.info.quantized_layers)
    for name, weight in theirs.items():
        assert weight.dtype == dtype and torch.equal(weight, ours[f"{name}.weight"]), name
    plain = tensors(tmp_path)
    kept = [n for n, t in model.state_dict().items() if n.rpartition(".")[0] not in theirs]
    assert kept and all(torch.equal(plain[n], model.state_dict()[n]) for n in kept)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_transformers_computes_the_same_logits(name, settings, tmp_path):
    _, result = exported(name, tmp_path, settings, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-0*-of-*.safetensors"))) > 2
    check_logits(load(tmp_path), result, name)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("settings", ASYMMETRIC.values(), ids=ASYMMETRIC.keys())
def test_transformers_dequantizes_to_the_same_logits(name, settings, tmp_path):
    _, result = exported(name, tmp_path, settings)
    check_logits(load(tmp_path, quantization_config=hf.CompressedTensorsConfig(dequantize=True)), result, name)


def check_logits(theirs, result, name):
    inputs = hf_models.inputs(name, 2, 7)
    actual, expected = theirs(**inputs)["logits"], result.graph_module(**inputs)["logits"]
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_tied_weights_are_stored_once(tmp_path):
    _, result = exported("qwen2", tmp_path, SETTINGS["g32"], tie=True)
    names = tensors(tmp_path)
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    check_logits(load(tmp_path), result, "qwen2")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_static_inputs(bits, symmetric, tmp_path):
    model = build("qwen2")
    model.config.save_pretrained(tmp_path)
    data = [hf_models.inputs("qwen2", 2, 7)]
    result = mq.quantize(
        model, calibration_data=data, bits=bits, group_size=32, skip_param_threshold=0, algorithm="rtn",
        activations="int8", activation_symmetric=symmetric,
    )  # fmt: skip
    mq.export_compressed_tensors(result, tmp_path)
    theirs = load(tmp_path)(**data[0])["logits"]
    torch.testing.assert_close(theirs, result.graph_module(**data[0])["logits"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(theirs, model(**data[0])["logits"], rtol=1e-3, atol=1e-3)

"""Exported folders, read by the packages that the format belongs to: compressed-tensors and transformers."""

import json
import logging

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors.base import BaseCompressor, compress_module
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle import apply as ct_apply
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import get_direct_state_dict
from compressed_tensors.utils.match import match_named_modules, match_targets
from safetensors.torch import load_file, save_file

import mono_quant_fx as mq
from tests import hf_models
from tests.checkpoint_models import Model, skeleton

#: The same weights bit for bit; our op sums tile by tile, and transformers runs the eager model.
TOLERANCE = 1e-4
#: name -> settings of quantize for transformers' models, whose rows are 64 and 128 wide
SETTINGS = {
    "g32": {"group_size": 32},
    "g128": {"group_size": 128, "short_row": "shrink"},
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
#: What the package alone is asked about, on a small model; transformers loads neither quantized embeddings nor all of
#: the asymmetric ones.
PACKAGE = {
    "g32": {"group_size": 32},
    "g128": {"group_size": 128, "short_row": "shrink"},
    "channel": {"group_size": -1},
    "int8": {"bits": 8},
    "g64 asym": {"group_size": 64, "symmetric": False},
    "channel asym": {"group_size": -1, "symmetric": False},
    "int8 asym": {"bits": 8, "symmetric": False},
    "mixed": {"group_size": 32, "overrides": {"down": "int8 asym", "up": "int4 g64 asym"}},
    "skips": {"group_size": 32, "modules_to_not_convert": ["up"]},
    "embeddings": {"group_size": 32, "overrides": {"embed": "int4 channel", "head": "int8"}},
}
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
    settings = {"skip_param_threshold": 0, "compute": "float32", **settings}  # kernels may round inputs to bfloat16
    result = mq.quantize(model, hf_models.inputs(name, 1, 9), **settings)
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
@pytest.mark.parametrize("settings", PACKAGE.values(), ids=PACKAGE.keys())
def test_the_package_decompresses_to_our_weights(settings, dtype, tmp_path):
    model = Model(dtype, tied=False)
    result = mq.quantize(model, skip_param_threshold=0, **settings)
    mq.export_compressed_tensors(result, tmp_path)
    theirs, ours = decompressed(model, tmp_path), mq.dequantize_model(result.graph_module).state_dict()
    assert sorted(theirs) == sorted(result.info.quantized_layers)
    for name, weight in theirs.items():
        assert weight.dtype == dtype and torch.equal(weight, ours[f"{name}.weight"]), name
    plain = tensors(tmp_path)
    kept = [n for n in model.state_dict() if n.rpartition(".")[0] not in theirs or n.endswith("bias")]
    assert kept and all(torch.equal(plain[n], model.state_dict()[n]) for n in kept)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, -1), (8, -1)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_what_the_package_wrote_is_imported(group_size, symmetric, bits, tmp_path):
    """Rounded, packed and described by the package; INT8 both ways, as bytes and packed into words."""
    strategy = "channel" if group_size == -1 else "group"
    size = None if group_size == -1 else group_size
    weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
    for form in ("pack-quantized", "int-quantized")[: 1 + (bits == 8)]:
        model, folder = Model(), tmp_path / form
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, ignore=["head"], format=form, quantization_status="frozen"
        )
        ct_apply.apply_quantization_config(model, config)
        expected = {}
        for name in ("up", "gate", "down"):
            module = model.get_submodule(name)
            low, high = (
                f(module.weight.detach().unflatten(1, (-1, size or module.in_features)), -1)
                for f in (torch.amin, torch.amax)
            )
            module.weight_scale.data, module.weight_zero_point = calculate(low, high, weights)
            compress_module(module)
            compressor = BaseCompressor.get_value_from_registry(form)
            local = {n: t.detach() for n, t in get_direct_state_dict(module).items() if t is not None}
            expected[f"{name}.weight"] = compressor.decompress(local, scheme)["weight"]
        folder.mkdir()
        save_file(
            {n: t.contiguous() for n, t in model.state_dict().items() if n != "head.weight"},
            folder / "model.safetensors",
        )
        (folder / "config.json").write_text(json.dumps({"quantization_config": config.model_dump(mode="json")}))
        gm = mq.import_compressed_tensors(folder, skeleton())
        ours = mq.dequantize_model(gm).state_dict()
        assert all(torch.equal(ours[n], weight) for n, weight in expected.items())


def calculate(low, high, weights):
    scale, zero = calculate_qparams(low, high, weights)
    return scale, torch.nn.Parameter(zero.to(torch.int8), requires_grad=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_transformers_computes_the_same_logits(name, settings, tmp_path):
    _, result = exported(name, tmp_path, settings, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-0*-of-*.safetensors"))) > 2
    check_logits(load(tmp_path), result, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("settings", ASYMMETRIC.values(), ids=ASYMMETRIC.keys())
def test_transformers_dequantizes_to_the_same_logits(name, settings, tmp_path):
    _, result = exported(name, tmp_path, settings)
    check_logits(load(tmp_path, quantization_config=hf.CompressedTensorsConfig(dequantize=True)), result, name)


def check_logits(theirs, result, name):
    inputs = hf_models.inputs(name, 2, 7)
    actual, expected = theirs(**inputs)["logits"], result.graph_module(**inputs)["logits"]
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
def test_tied_weights_are_stored_once(tmp_path):
    _, result = exported("qwen2", tmp_path, SETTINGS["g32"], tie=True)
    names = tensors(tmp_path)
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    check_logits(load(tmp_path), result, "qwen2")


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_static_inputs(bits, symmetric, tmp_path):
    model = build("qwen2")
    model.config.save_pretrained(tmp_path)
    data = [hf_models.inputs("qwen2", 2, 7)]
    result = mq.quantize(
        model, calibration_data=data, bits=bits, group_size=32, skip_param_threshold=0, algorithm="rtn",
        activations="int8", activation_symmetric=symmetric, compute="float32",
    )  # fmt: skip
    mq.export_compressed_tensors(result, tmp_path)
    theirs = load(tmp_path)(**data[0])["logits"]
    torch.testing.assert_close(theirs, result.graph_module(**data[0])["logits"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(theirs, model(**data[0])["logits"], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_skeleton_of_transformers(name, tmp_path):
    """Parameters on meta, exported with an example on the CPU, in bfloat16, tied, from shards."""
    _, result = exported(name, tmp_path, SETTINGS["mixed"], shard_bytes=20_000, dtype=torch.bfloat16, tie=True)
    model = build(name, dtype=torch.bfloat16, tie=True)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, torch.nn.Parameter(parameter.to("meta"), requires_grad=False))
    model.lm_head.weight = model.model.embed_tokens.weight
    gm = mq.import_compressed_tensors(tmp_path, model, hf_models.inputs(name, 1, 9), compute="float32")
    inputs = hf_models.inputs(name, 2, 7)
    assert torch.equal(gm(**inputs)["logits"], result.graph_module(**inputs)["logits"])
    assert not any(t.is_meta for t in gm.state_dict().values())

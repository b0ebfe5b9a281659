"""The shape of the project: imports point one way, files stay small, and the wheel holds what it should."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mono_quant_fx as mq

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mono_quant_fx"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "passes").glob("*.py")])

#: Each layer may import the layers above its own line, and its own. Modules that are not named belong to the last.
LAYERS = [
    {
        "errors",
        "version",
        "html",
        "layout",
        "ways_out",
        "surroundings",
        "this_thread",
        "tracing_lock",
        "copying",
        "file_kinds",
        "wrapped_names",
    },
    {"belongings", "checks", "own_names", "randomness", "records", "tensor_header", "workers"},
    {"folder_paths"},
    {"checkpoint_files"},
    {"tensor_writer"},
    {"tensor_file"},
    {"tensor_folder"},
    {"partial_folder"},
    {"config"},
    {"numerics", "metrics", "storage_bytes", "compressed_tensors_config"},
    {"compressed_tensors_groups"},
    {"foreign_packing", "foreign_tensors"},
    {"foreign_compressed", "foreign_gptq"},
    {"native", "forking"},
    {"ops"},
    {"arguments", "free_names"},
    {"permutations"},
    {"weight_table"},
    {"graph", "clip"},
    {"norm_patterns", "fingerprint", "regions"},
    {"gptq", "normal_weights"},
    {"refine"},
    {"rounding"},
    {"table_html", "pass_html"},
    {"calls", "effect_tables", "pure_writes", "untouched", "writable_proxy", "rebinding"},
    {"effects"},
    {"annotation", "weight_ops", "data", "state", "value_types", "views", "out_of_place", "lookups", "memory"},
    {"current_values"},
    {"inner_graphs", "write_walk"},
    {"functionalize"},
    {"codes", "provenance", "noise"},
    {
        "rules",
        "values",
        "quant_tracer",
        "twins",
        "capture_errors",
        "run",
        "printing",
        "bisection_report",
        "table",
        "modules",
        "windows",
        "layer_inputs",
        "rewrite",
        "dynamo_graph",
        "dynamo_frames",
        "agreement",
        "variants",
        "stopwatch",
        "aliasing",
        "outputs",
        "table_row",
    },
    {"collection", "weight_figures", "judging"},
    {"held_out"},
    {
        "tracer",
        "merging",
        "draw_facts",
        "biases",
        "capture_record",
        "json_values",
        "allowed_aten",
        "allowed_calls",
        "checked_calls",
    },
    {"graph_ops", "tree_json", "leaf_modules", "tensor_table", "guards", "graph_names"},
    {"call_checks", "stored_writes"},
    {"graph_writer"},
    {"graph_reader"},
    {"graph_json"},
    {"draw_tree"},
    {"draw_svg"},
    {"draw"},
    {"exporter", "faithfulness", "export_sizes", "observer_base", "kl_divergence"},
    {"export_ways"},
    {"histogram"},
    {"select_observer"},
    {"observers"},
    {"carry"},
    {"sequential"},
    {"capture_checks"},
    {"capture", "lockstep", "saving"},
    {"info"},
    {"capture_again", "float_graphs", "result", "statements", "shard_plan", "checkpoint"},
    {"accuracy", "export_compressed_tensors", "foreign_weights"},
    {"pass_base"},
    {"bisection"},
    {"dequantize_model"},
    {"findings", "coverage", "validation", "shared_codes", "code_summary"},
    {"explanation"},
    {"explain"},
    {"compile_report"},
    {"passes"},
    {"pipelines"},
    {"compiler", "loading", "import_compressed_tensors", "weight_stream"},
    {"stream_job"},
    {"stream_files"},
    {"streaming"},
    {"compile_backend", "verification"},
    {"cli_text", "cli_options", "cli_streams"},
    {"cli_inputs", "cli_report", "cli_compare"},
    {"cli_quantize", "cli_export"},
    {"__init__", "__main__", "cli", "demo", "demo_model"},
]


def module_name(path: Path) -> str:
    """config for mono_quant_fx/config.py, ops for anything in ops/, passes for anything in passes/."""
    if path.parent.name in ("passes", "ops"):
        return path.parent.name
    return path.stem


def imports_of(path: Path) -> set[str]:
    """The project's modules that a file imports, at any depth of the file; "" is the bare package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "mono_quant_fx":
            names |= {f"mono_quant_fx.{a.name}" for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    ours = {n for n in names if n == "mono_quant_fx" or n.startswith("mono_quant_fx.")}
    return {n.split(".")[1] if "." in n else "" for n in ours}


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = module_name(path)
    for name in imports_of(path):
        if path == PACKAGE / "__init__.py":
            continue
        assert name != "", f"{path.name} imports the bare package"
        assert layer(name) <= layer(own), f"{own} must not import {name}"
        if own == "passes" and name == "passes":
            assert path.name == "__init__.py", "a pass never imports another pass"


def outside_imports(path: Path) -> set[str]:
    """Every module that a file imports, by its full name."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    return names | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}


def test_config_and_errors_do_not_need_torch():
    for name in ("config", "errors"):
        assert "torch" not in {n.split(".")[0] for n in outside_imports(PACKAGE / f"{name}.py")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 290, "split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            length = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert length <= 60, f"{node.name} has {length} lines"


def test_nothing_unpickles_or_evaluates():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "__import__"), path
                assert name != "torch.load" or "weights_only=True" in ast.unparse(node), path


def test_only_torch_safetensors_and_tabulate_are_needed():
    allowed = {"mono_quant_fx", "torch", "safetensors", "tabulate", *sys.stdlib_module_names}
    for path in SOURCES:
        names = outside_imports(path)
        assert not [n for n in names if n.startswith(("torch.ao", "torch.quantization"))], "deprecated"
        extra = {"tokenizers"} if path.name == "cli/demo_model.py" else set()  # the extra [demo]
        assert {n.split(".")[0] for n in names} <= allowed | extra, path


def test_the_public_names_are_there_and_documented():
    for name in mq.__all__:
        value = getattr(mq, name)
        assert value.__doc__ or not callable(value), name
    assert set(mq.passes.__all__) == {
        "SkipAnnotation", "PlanRestoration", "CodeAttachment", "ObserverInsertion", "CalibrationExecution",
        "ActivationLowering", "BiasCorrection", "Int4GroupwiseLowering", "DequantFusion", "LinearMerging",
    }  # fmt: skip


def test_the_top_level_is_the_design_card():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    top = {name.split("/")[0] for name in listed if name}
    expected = {"mono_quant_fx", "passes", "tests", "docs", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {n for n in top if not n.startswith(".")} <= expected


USE = """
import sys, torch, mono_quant_fx as mq
assert not mq.__file__.startswith(sys.argv[1]), mq.__file__
gm = mq.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), group_size=32).graph_module
assert gm(torch.randn(1, 64)).shape == (1, 64)
assert mq.passes.DequantFusion.__module__ == "mono_quant_fx.passes.dequant_fusion"
print("used")
"""


@pytest.mark.slow
def test_the_wheel_installs_in_a_fresh_venv_and_runs_outside_the_repo(tmp_path):
    source, dist, venv = tmp_path / "source", tmp_path / "dist", tmp_path / "venv"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(dist), str(source)], check=True)
    (wheel,) = dist.glob("*.whl")
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True).stdout
    packaged = {line.split()[0] for line in names.splitlines()[1:]}
    assert {
        "mono_quant_fx/passes/dequant_fusion.py",
        "mono_quant_fx/ops/linear.py",
        "mono_quant_fx/py.typed",
    } <= packaged
    assert not [n for n in packaged if n.startswith(("passes/", "tests/"))]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    # torch and the other dependencies come from this environment, whose editable install is not on this path
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    used = subprocess.run(
        [str(python), "-c", USE, str(ROOT)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert used.stdout == "used\n", used.stderr

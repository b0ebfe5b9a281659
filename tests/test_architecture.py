"""The shape of the project: imports point one way, files stay small, and the wheel holds what it should."""

import ast
import os
import re
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

#: The tiers, the ground first. A room may import rooms of lower tiers, and along the arrows inside its own tier.
TIERS = [
    "errors version files process web pass_change checks config",
    "numerics ops",
    "graph functionalization execution pass_base",
    "frontend calibration accuracy passes pipelines",
    "storage compiler streaming interop reports torch_compile",
    "cli __init__ __main__",
]
ARROWS = {
    "config": "checks errors",
    "checks": "errors",
    "files": "errors",
    "pass_change": "web",
    "ops": "numerics",
    "functionalization": "graph",
    "execution": "graph",
    "pass_base": "graph",
    "accuracy": "frontend",
    "passes": "calibration frontend",
    "pipelines": "passes",
    "compiler": "storage",
    "streaming": "storage",
    "interop": "storage",
    "reports": "storage",
    "__main__": "cli",
}
TIER_OF = {room: number for number, rooms in enumerate(TIERS) for room in rooms.split()}
ROOMS = sorted({path.parent for path in SOURCES if path.parent not in (PACKAGE, ROOT / "passes")})


def room_of(path: Path) -> str:
    """The folder in mono_quant_fx/ that a file lies in, passes, or a file of the package's own by its name."""
    if path.parent == ROOT / "passes":
        return "passes"
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports_of(path: Path) -> set[str]:
    """The rooms that a file imports, at any depth of the file; "" is the bare package."""
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_or_along_an_arrow(path):
    own = room_of(path)
    for room in imports_of(path) - {own}:
        if path == PACKAGE / "__init__.py":
            continue
        assert room != "", f"{path.name} imports the bare package"
        down = TIER_OF[room] < TIER_OF[own]
        assert down or room in ARROWS.get(own, "").split(), f"{own} must not import {room}"


def test_the_arrows_inside_a_tier_are_no_circle():
    for start in ARROWS:
        seen, left = set(), [start]
        while left:
            left += [room for room in ARROWS.get(left.pop(), "").split() if room not in seen and not seen.add(room)]
        assert start not in seen
    for room, others in ARROWS.items():
        assert {TIER_OF[other] for other in others.split()} == {TIER_OF[room]}, "an arrow out of its tier says nothing"


def test_a_pass_never_imports_another_pass():
    for path in (ROOT / "passes").glob("*.py"):
        assert path.name == "__init__.py" or "passes" not in imports_of(path), path


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_says_what_it_is_for_and_is_packaged(room):
    words = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert words is not None and len(words.split()) >= 8
    name = ".".join(("mono_quant_fx", *room.relative_to(PACKAGE).parts))
    assert f'"{name}"' in (ROOT / "pyproject.toml").read_text()


def test_the_tiers_of_the_design_page_are_these():
    page = (ROOT / "docs/design.md").read_text()
    for rooms in TIERS:
        for room in rooms.split():
            assert re.search(rf"\b{room}\b", page), room


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
        text = path.read_text()
        assert ".numpy()" not in text and "import save_file" not in text, (
            f"{path}: both need numpy, which may be absent"
        )
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

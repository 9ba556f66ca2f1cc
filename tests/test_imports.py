"""Imports follow the data, one way, and none of them is TensorFlow or torch."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "lrq_jax"

# Each row may import from rows above it, and from its own package. Every package and module at
# the top of lrq_jax stands in exactly one row.
ORDER = (
    ("__init__",),
    (
        "ops",
        "graph",
        "sharding",
        "processes",
        "console",
        "paths",
        "hints",
        "huge_pages",
        "report_file",
    ),
    ("quantizers", "networks", "data", "endings"),
    ("passes", "losses", "synthesis", "checkpoints"),
    ("readers", "method", "resources"),
    ("presets",),
    ("config", "evaluation"),
    ("run_directory", "writers", "reproduce"),
    ("runtimes", "training", "report", "reference"),
    ("compare",),
    ("quantize",),
    ("exported", "estimate"),
    ("verify", "bench", "evaluate"),
    ("export",),
    ("api", "main"),
)
ROW = {room: row for row, rooms in enumerate(ORDER) for room in rooms}

# Rooms that never know of another, though the order would let them: each is used on its own.
INDEPENDENT = {
    "ops",
    "graph",
    "sharding",
    "processes",
    "console",
    "paths",
    "hints",
    "huge_pages",
    "report_file",
    "losses",
    "synthesis",
    "data",
}
ALLOWED_FOR_INDEPENDENT = {"synthesis": {"ops"}, "losses": {"ops"}, "data": {"paths"}}

NEVER = {"tensorflow", "torch", "keras", "clu"}
# Imported by the function that needs them: a run that does not read images this way, or a user
# of the library without them, never pays.
LAZY = {
    "PIL", "ai_edge_litert", "h5py", "jinja2", "markupsafe", "matplotlib", "ml_collections", "onnx", "onnxruntime", "openvino", "sklearn", "tensorboardX",
    "tensorflow_datasets",
}  # fmt: skip
MAY_IMPORT_AT_TOP = {"main": {"ml_collections"}}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    """First part of a module's name inside lrq_jax: its package, or its own name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def nodes(tree, *, inside_functions):
    """Statements of a module; without those of its functions, or with them. TYPE_CHECKING blocks
    are never run and do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if function and not inside_functions:
            continue
        yield node
        yield from nodes(node, inside_functions=inside_functions)


def imported(path, *, inside_functions=True):
    """Dotted names a module imports; relative ones made absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("lrq_jax", *path.relative_to(PACKAGE).parts[:-1])
    for node in nodes(tree, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*base, node.module or "")).strip(".")
            yield base
            if base == "lrq_jax":  # from lrq_jax import losses
                yield from (f"lrq_jax.{alias.name}" for alias in node.names)


def rooms_imported(path):
    names = {name.split(".")[1] for name in imported(path) if name.startswith("lrq_jax.")}
    return {name for name in names if name != "__version__"}


def test_the_order_names_every_package_and_module_once():
    found = {room_of(path) for path in modules()}
    assert sorted(found) == sorted(ROW)
    assert len(ROW) == sum(len(rooms) for rooms in ORDER)
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "assets"}
    assert packages - {"__pycache__"} <= set(ROW)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    for other in rooms_imported(path):
        assert other == room or ROW.get(other, len(ORDER)) < ROW[room], (
            f"{path.relative_to(REPOSITORY)} imports lrq_jax.{other}, which is not before {room} "
            "in ORDER: move what both need to an earlier package"
        )


@pytest.mark.parametrize("room", sorted(INDEPENDENT))
def test_independent_rooms_know_of_no_other(room):
    allowed = {room} | ALLOWED_FOR_INDEPENDENT.get(room, set())
    found = {name for path in modules() if room_of(path) == room for name in rooms_imported(path)}
    assert found <= allowed


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_a_heavy_package_at_its_top(path):
    anywhere = {name.split(".")[0] for name in imported(path)}
    assert not anywhere & NEVER
    at_top = {name.split(".")[0] for name in imported(path, inside_functions=False)}
    assert not at_top & (LAZY - MAY_IMPORT_AT_TOP.get(room_of(path), set()))


def test_the_finder_of_imports_finds_them(tmp_path, monkeypatch):
    """The tests above would pass if it found nothing."""
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    path = tmp_path / "ops" / "x.py"
    path.write_text(
        "import typing, torch.nn\n"
        "from lrq_jax import main\n"
        "from . import y\n"
        "from ..training.loop import z\n"
        "if typing.TYPE_CHECKING:\n    import keras\n"
        "try:\n    import onnx\nexcept ImportError:\n    pass\n"
        "class A:\n    import clu\n"
        "def f():\n    import tensorflow as tf\n"
    )
    everything = set(imported(path))
    assert {"torch.nn", "lrq_jax.main", "lrq_jax.training.loop", "onnx", "clu"} <= everything
    assert "tensorflow" in everything
    assert "keras" not in everything
    assert "tensorflow" not in set(imported(path, inside_functions=False))
    assert rooms_imported(path) == {"main", "ops", "training"}


# --- at run time ---------------------------------------------------------------------------------


def run_python(code, cwd):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_importing_the_command_imports_nothing_heavy(tmp_path):
    code = "import json, sys, lrq_jax.main; print(json.dumps(sorted(sys.modules)))"
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = {name.split(".")[0] for name in json.loads(result.stdout)}
    assert not loaded & (NEVER | (LAZY - {"ml_collections"}))
    assert "jax" in loaded


def test_the_core_imports_no_config_language(tmp_path):
    code = (
        "import json, sys, lrq_jax.quantize, lrq_jax.readers, lrq_jax.config\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = {name.split(".")[0] for name in json.loads(result.stdout)}
    assert not loaded & (NEVER | LAZY)


def extras_named(tree):
    """Values of every `extra="..."` in a call."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    words = (word for call in calls for word in call.keywords if word.arg == "extra")
    return {word.value.value for word in words if isinstance(word.value, ast.Constant)}


def test_every_extra_an_error_names_can_be_installed():
    named = set().union(*(extras_named(ast.parse(path.read_text())) for path in modules()))
    assert {"onnx", "litert", "openvino"} <= named
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    files = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert named <= set(files)
    for extra in named:
        for name in files[extra]["file"]:
            assert (REPOSITORY / name).read_text().strip()

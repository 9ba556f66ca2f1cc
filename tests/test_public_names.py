"""Every public name has a docstring, and the package says its version the same way everywhere."""

import importlib
import inspect
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import lrq_jax
from lrq_jax import api

REPOSITORY = Path(__file__).resolve().parents[1]
RUN_AS_SCRIPT = {"lrq_jax.main", "lrq_jax.report.__main__"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lrq_jax.__path__, "lrq_jax.")
    if module.name not in RUN_AS_SCRIPT  # defines command-line flags when imported
)


def undocumented(module):
    """Public functions, classes, methods and properties of a module that say nothing."""
    missing = [] if inspect.getdoc(module) else [module.__name__]
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not value.__doc__ or is_made_by_dataclass(value):
            missing.append(f"{module.__name__}.{name}")
        if inspect.isclass(value):
            for part, member in vars(value).items():
                function = member.fget if isinstance(member, property) else getattr(member, "func", member)  # fmt: skip
                function = getattr(function, "__func__", function)
                if part.startswith("_") or not inspect.isfunction(function):
                    continue
                if not inspect.getdoc(getattr(value, part)) and not inspect.getdoc(function):
                    missing.append(f"{module.__name__}.{name}.{part}")
    return missing


def is_made_by_dataclass(value):
    """A dataclass or NamedTuple without a docstring is given its signature as one."""
    return inspect.isclass(value) and value.__doc__.startswith(f"{value.__name__}(")


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_says_what_it_is(name):
    assert undocumented(importlib.import_module(name)) == []


def test_the_finder_finds_what_says_nothing(tmp_path, monkeypatch):
    (tmp_path / "silent.py").write_text(
        '"""A module."""\nimport dataclasses\n'
        "def f(): pass\n"
        "@dataclasses.dataclass\nclass A:\n    x: int = 0\n"
        'class B:\n    """Says."""\n    def m(self): pass\n    @property\n    def p(self): pass\n'
        "    def _private(self): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = undocumented(importlib.import_module("silent"))
    assert found == ["silent.f", "silent.A", "silent.B.m", "silent.B.p"]


def test_the_library_names_what_it_offers():
    assert sorted(api.__all__) == api.__all__
    for name in api.__all__:
        assert inspect.getdoc(getattr(api, name))


def test_one_version_everywhere_and_in_the_changelog():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == lrq_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", lrq_jax.__version__)
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "semver.org" in changelog
    assert "## [Unreleased]" in changelog


def test_ci_checks_the_types():
    config = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]
    assert config["check_untyped_defs"] is True
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert re.search(r"^mypy -p lrq_jax$", ci, re.MULTILINE)

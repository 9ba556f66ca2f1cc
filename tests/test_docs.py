"""No documented command is stale: each is run here, or parsed here and run by the test named."""

import html.parser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_data
from PIL import Image
from test_terminal import parsed

from lrq_jax import api, bench, compare, evaluate, export, verify
from lrq_jax.config import resolve
from lrq_jax.report import __main__ as report

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

RUN_HERE = {
    "lrq_jax.export": export.main,
    "lrq_jax.verify": verify.main,
    "lrq_jax.bench": bench.main,
    "lrq_jax.evaluate": evaluate.main,
    "lrq_jax.compare": compare.main,
    "lrq_jax.report": report.main,
}
COVERED = {
    r"pip install .*": ".ci/run",
    r"python3 -m venv .*": ".ci/run",
    r"python -m pytest .*": ".ci/run",
    r"ruff check \. && ruff format --check \. && mypy -p lrq_jax": ".ci/run",
    r"mkdocs build --strict": "test_the_site_is_built_without_a_network, .ci/run",
    r"mkdocs serve": "its server alone: what it shows is built as above",
    r"python -m lrq_jax\.main.* --(list|fields|estimate)": "tests/test_terminal.py",
    r"python -m lrq_jax\.main.*": "tests/test_documented_runs.py; flags parsed here",
    r"python scripts/convert_teacher\.py .*": "tests/test_documented_runs.py; flags parsed here",
    r"python scripts/run_experiments\.py .*": "tests/test_documented_runs.py, a small suite",
    r"python scripts/allocate_bits\.py .*": "tests/test_documented_runs.py",
    r"python scripts/check_onnx_families\.py .*": "by hand: it reads every network known",
    r"python scripts/make_docs\.py": "tests/test_terminal.py",
    r"python benchmarks/\w+\.py.*": "hours; flags parsed here, parts run in tests/test_benchmarks.py",
    r"python scripts/(train_digits_teacher|run_experiments|allocate_bits)\.py": "named only; tests/test_documented_runs.py",
    r"python -m lrq_jax\.reference": "tests/test_terminal.py",
    r"tensorboard --logdir .*": "another project's command; the events are read in test_main.py",
}
"""Commands that are not run by this file: what does."""


def commands(page):
    """Lines of code blocks that a shell would run, with continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(
        r"^    ((?:[A-Z_]+=\S+ +)*(?:pip|python|python3|ruff|mkdocs|\.ci)\b.*)$",
        outside,
        re.MULTILINE,
    )
    lines += re.findall(
        r"`((?:[A-Z_]+=\S+ )*(?:python3? (?:-m|\S+\.py)|mkdocs |ruff |pip )[^`]*)`", outside
    )
    lines += [
        f"python {found}"
        for found in re.findall(r"`((?:benchmarks|scripts)/\w+\.py[^`]*)`", outside)
    ]
    return [" ".join(line.partition("  #")[0].split()) for line in lines if line.strip()]


def without_environment(line):
    """The command behind `NAME=value` words."""
    return re.sub(r"^(?:[A-Z_]+=\S+ +)+", "", line)


DOCUMENTED = [(page, line) for page in PAGES for line in commands(page)]
HERE = [(p, line) for p, line in DOCUMENTED
        if (m := re.match(r"python -m (lrq_jax\.\w+)", line)) and m[1] in RUN_HERE]  # fmt: skip


def test_there_are_documented_commands():
    assert len(DOCUMENTED) > 40
    assert len(HERE) > 10


@pytest.mark.parametrize("line", sorted({line for _, line in DOCUMENTED}))
def test_each_command_is_run_by_something(line):
    for part in re.split(r" && (?=python -m (?:lrq_jax|pytest))", without_environment(line)):
        module = re.match(r"python -m (lrq_jax\.\w+)", part)
        if module and module[1] in RUN_HERE:
            continue
        assert any(re.fullmatch(pattern, part) for pattern in COVERED), (
            f"{part!r} is documented and run by no test: run it here, or name what does in COVERED"
        )


@pytest.mark.parametrize("line", sorted({line for _, line in DOCUMENTED if "lrq_jax.main" in line}))
def test_flags_of_the_main_command_exist_and_have_values_it_takes(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    line = line[line.index("python -m lrq_jax.main") :].replace("NAME", "digits")
    arguments = shlex.split(line)
    files = [
        argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")
    ]
    own = ("--workdir=", "--list", "--fields", "--estimate", "--config=")
    kept = [a for a in arguments if not a.startswith(own)]
    for file in files:
        assert (REPOSITORY / file).is_file(), file
    config = parsed(shlex.join(kept), api._config(files[-1]) if files else None)
    large = any("r18" in file for file in files)
    resolve(config, image_size=224 if large else 32)


@pytest.mark.parametrize(
    "line", sorted({line for _, line in DOCUMENTED if line.startswith("python scripts/convert")})
)
def test_flags_of_the_converter_exist(line):
    if "--list" in line:
        return
    import runpy

    parser = runpy.run_path(str(REPOSITORY / "scripts" / "convert_teacher.py"))["_parser"]()
    assert parser.parse_args(shlex.split(line)[2:]).source


PARSED = sorted(
    {
        found[0]
        for line in [line for _, line in DOCUMENTED]
        + [line for file in (REPOSITORY / "benchmarks").glob("*.py") for line in commands(file)]
        if (
            found := re.search(
                r"python (?:benchmarks/(?!joint_worker)|scripts/(?:run|allocate))\S*\.py.*", line
            )
        )
    }
)


@pytest.mark.parametrize("line", PARSED)
def test_flags_of_benchmarks_and_experiments_exist(line, monkeypatch):
    import runpy

    script, *flags = shlex.split(line.replace("--suite SUITE", "--suite fast"))[1:]
    monkeypatch.syspath_prepend((REPOSITORY / script).parent)  # as when it is started
    parser = runpy.run_path(str(REPOSITORY / script))["_parser"]()
    if flags:  # else the script is named only
        assert vars(parser.parse_args([flag for flag in flags if flag != "[...]"]))


def test_the_benchmarks_own_usage_is_among_what_is_parsed():
    assert len(PARSED) > 12
    assert any("joint_step.py --compiled" in line for line in PARSED)
    assert any("run_experiments.py --suite fast" in line for line in PARSED)


@pytest.fixture(scope="module")
def ground(tiny_run, tmp_path_factory):
    """A folder in which the documented places are there: runs, an export, images."""
    pytest.importorskip("onnxruntime")
    place = tmp_path_factory.mktemp("documented")
    for name in ("r18", "r20", "latest"):
        shutil.copytree(tiny_run[0].path, place / "runs" / name)
    folder = place / "DIR_OF_IMAGES"
    folder.mkdir()
    rows = ["file,label"]
    for index, (pixels, label) in enumerate(tiny_data(12).source):
        Image.fromarray(pixels[..., 0]).save(folder / f"{index}.png")
        rows.append(f"{index}.png,{label}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    export.export_student(place / "runs" / "r18", place / "exported")
    return place


@pytest.mark.parametrize("line", sorted({line for _, line in HERE}))
def test_commands_run_as_they_are_written(line, ground, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECONDS", 0.05)
    monkeypatch.setenv("LRQ_CACHE", str(tmp_path / "cache"))
    for name in ("runs", "exported", "DIR_OF_IMAGES"):
        shutil.copytree(ground / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.replace("DIR_OF_TEST_IMAGES", "DIR_OF_IMAGES"))
    if words[1:3] == ["-m", "lrq_jax.export"]:
        shutil.rmtree(tmp_path / "exported")
        if "litert" in line:
            pytest.importorskip("ai_edge_litert")
    if not words[3:] or words[3] in ("DIR", "RUN", "exported/model.onnx", "OUT"):
        pytest.skip("names the command only; the whole one stands elsewhere")
    assert RUN_HERE[words[2]](words[3:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_python_compiles_and_imports_what_there_is(page):
    import ast
    import importlib

    for snippet in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lrq_jax"):
                for alias in node.names:
                    assert getattr(importlib.import_module(node.module), alias.name)


def test_the_documented_inference_runs(ground, monkeypatch, capsys):
    text = (REPOSITORY / "docs" / "deployment.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(ground)
    exec(compile(snippet, "deployment.md", "exec"), {})
    assert re.search(r"\[\d\]", capsys.readouterr().out)


class Links(html.parser.HTMLParser):
    """Every resource a page asks for."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        loads = {"script": "src", "img": "src", "link": "href"}
        if tag in loads and loads[tag] in attrs:
            self.found.append(attrs[loads[tag]])


def test_the_site_is_built_without_a_network(tmp_path):
    pytest.importorskip("mkdocs")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) >= 11
    for page in pages:
        for link in Links(page.read_text(encoding="utf-8")).found:
            assert not re.match(r"(https?:)?//", link), f"{page.name} asks the network for {link}"
    assert json.loads((tmp_path / "site" / "search" / "search_index.json").read_text())["docs"]


def four_commands():
    """The README's way from a `.pth` to a verified ONNX file, a line each."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.partition("From a `.pth`")[2].partition("\n## ")[0]
    block = re.search(r"\n\n((?:    .*\n)+)", section)[1].replace("\\\n", " ")
    return [line.strip() for line in block.splitlines()]


def test_readme_takes_a_pth_to_a_verified_onnx_file_in_four_commands():
    lines = four_commands()
    assert len(lines) <= 4
    assert ".pth" in lines[1]
    assert [line.split()[2] for line in lines[1:]] == [
        "lrq_jax.main", "lrq_jax.export", "lrq_jax.verify",
    ]  # fmt: skip

"""The page of a run: whole in one file, and every number in it report.json's."""

import dataclasses
import html.parser
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_FIELDS
from small_networks import calibrated, gated_like, random_images, resnet_like
from test_steps import tiny_teacher

from lrq_jax import api
from lrq_jax.passes import calibrate, student_forward
from lrq_jax.passes.equalization import equalized
from lrq_jax.passes.float_forward import float_forward
from lrq_jax.passes.integer_forward import integer_forward
from lrq_jax.report import __main__ as command
from lrq_jax.report import layer_rows, measure, plots
from lrq_jax.report.page import lookup, write_page
from lrq_jax.writers.codes import frozen_from_codes, load_student, student_codes

pytestmark = pytest.mark.usefixtures("quick_compilation", "one_device")

REPOSITORY = Path(__file__).resolve().parents[1]


class Page(html.parser.HTMLParser):
    """Text outside marked values, the marked values, and every attribute that names a resource."""

    def __init__(self, text):
        super().__init__()
        self.values, self.loose, self.resources, self._stack = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "link", "img"):
            self._stack.append(tag)
        if tag == "data":
            self.values.append([attrs["data-path"], attrs["value"], ""])
        self.resources += [attrs[name] for name in ("src", "href") if name in attrs]

    def handle_endtag(self, tag):
        self._stack.pop()

    def handle_data(self, data):
        if self._stack and self._stack[-1] == "data":
            self.values[-1][2] += data
        elif "style" not in self._stack:
            self.loose.append(data)


@pytest.fixture(scope="module")
def page(tiny_run):
    return Page((tiny_run[0].path / "report.html").read_text(encoding="utf-8"))


def test_every_number_is_a_field_of_the_report(tiny_run, page):
    report = json.loads((tiny_run[0].path / "report.json").read_text())
    assert len(page.values) > 60
    for path, value, shown in page.values:
        stored = lookup(report, path)
        assert json.loads(value) == stored, path
        if isinstance(stored, float):
            digits = len(shown.partition(".")[2])
            assert shown == f"{stored:,.{digits}f}", path
        else:
            assert shown == ("-" if stored is None else f"{stored:,}" if isinstance(stored, int)
                             else stored), path  # fmt: skip
    shown = {path for path, *_ in page.values}
    for name in ("teacher/top1", "student/top1", "drop", "agreement", "layers/0/sqnr_db", "seed",
                 "batch_norms/2/std_ratio", "wall_seconds/training", "versions/jax", "command",
                 "size/bytes"):  # fmt: skip
        assert name in shown


def test_no_number_stands_outside_the_marked_fields(page):
    assert not re.findall(r"\d", " ".join(page.loose))


def test_it_is_one_small_file_that_asks_for_nothing(tiny_run, page):
    file = tiny_run[0].path / "report.html"
    assert file.stat().st_size < 5e6
    assert page.resources
    assert all(name.startswith("data:") for name in page.resources)
    assert not re.search(r"url\(|@import|<script", file.read_text(encoding="utf-8"))


def test_it_shows_all_there_is(page):
    kinds = [name.partition(";")[0] for name in page.resources]
    assert kinds.count("data:image/svg+xml") == 5  # losses, layers, histogram, statistics, map
    assert kinds.count("data:image/png") == 20  # synthetic and nearest
    assert 2 <= kinds.count("data:image/jpeg") <= 4


def test_the_facts_are_those_of_the_stored_student(tiny_run):
    result, data, _ = tiny_run
    report = result.report
    assert [row["layer"] for row in report["layers"]][-1] == "classifier"
    assert {row["weight_bits"] for row in report["layers"]} == {3}
    assert report["size"]["bytes"] == sum(row["bytes"] for row in report["layers"])
    assert sum(report["histogram"]["codes"]) == sum(report["histogram"]["weights"])
    assert len(report["histogram"]["codes"]) == 8
    apart = report["disagreements"]
    assert apart["images"] == round((100 - report["agreement"]) * data.num_examples / 100)
    assert sum(pair["images"] for pair in apart["pairs"]) == apart["images"]
    assert all(pair["teacher"] != pair["student"] for pair in apart["pairs"])
    assert report["synthetic"]["images"] == 120


# --- the measurements ----------------------------------------------------------------------------


def facts_of(bits):
    """Facts of a small network at some bits, on ranges that were calibrated at four."""
    student, variables, _ = calibrated(resnet_like, 4)
    spec = dataclasses.replace(student.spec, weight_bits=bits, act_bits=bits)
    student = dataclasses.replace(student, spec=spec)
    images = np.asarray(random_images(3))
    codes = student_codes(student, variables)
    measured = measure(
        student,
        frozen_from_codes(codes),
        codes,
        teacher_variables=variables,
        images=images,
        labels=np.arange(len(images)) % student.graph.num_classes,
        data=None,
        preprocessing=None,
    )
    return measured, student, variables


def test_more_bits_mean_less_noise_layer_by_layer():
    low, high = (facts_of(bits)[0].facts["layers"] for bits in (3, 8))
    for a, b in zip(low, high, strict=True):
        assert b["sqnr_db"] > a["sqnr_db"] + 10
        assert b["bytes"] > a["bytes"]
        assert a["float_bytes"] == b["float_bytes"]


def test_the_noise_is_that_of_its_definition():
    measured, student, variables = facts_of(3)
    row = measured.facts["layers"][1]
    images, name = measured.arrays["images"], row["output"]
    t = np.asarray(float_forward(student.graph, variables, images, (name,))[name])
    s = np.asarray(student_forward(student, variables, images, (name,))[name])
    expected = 10 * np.log10((t**2).sum() / ((t - s) ** 2).sum())
    assert row["sqnr_db"] == pytest.approx(expected, abs=0.02)
    assert row["low"] <= s.min() + 1e-4
    assert row["high"] >= s.max() - 1e-4


def test_the_noise_of_an_equalized_student_is_that_beside_its_own_channels(tmp_path):
    """Not beside those of the teacher as it was, which are scaled otherwise."""
    teacher = tiny_teacher()
    result = api.quantize(
        teacher, workdir=tmp_path / "run", steps=0, verbose=False,
        fields={**TINY_FIELDS, "method.equalize": True},
    )  # fmt: skip
    student, codes, _ = load_student(result.path / "student")
    scaled = equalized(teacher.graph, teacher.variables)
    images = np.load(result.path / "report.npz")["images"]
    rows = result.report["layers"]
    names = tuple(row["output"] for row in rows)
    ours = integer_forward(student.operations, frozen_from_codes(codes), images, names,
                           input_bits=student.spec.boundary_bits)  # fmt: skip

    def noise(variables):
        t = float_forward(teacher.graph, variables, images, names)
        return [10 * np.log10(jnp.sum(t[n] ** 2) / jnp.sum((t[n] - ours[n]) ** 2)) for n in names]

    found = [row["sqnr_db"] for row in rows]
    np.testing.assert_allclose(found, noise(scaled), atol=0.02)
    assert np.abs(np.subtract(found, noise(teacher.variables))).max() > 0.5


def test_a_single_logged_value_is_seen():
    """A line of one point has no length."""
    for losses in ([1.0], [1.0, 2.0]):
        logged = [{"step": i, "phase": "x", "student/loss": v} for i, v in enumerate(losses)]
        svg = plots.loss_curves(logged).decode()
        inside = re.findall(r'<g clip-path="url[^"]*">.*?</g>', svg, re.DOTALL)
        markers = [part for part in inside if "<use" in part]
        assert len(markers) == (1 if len(losses) == 1 else 0)


def test_a_network_with_gates_and_shuffles_has_rows():
    student, variables, _ = calibrated(gated_like, 4)
    rows = layer_rows(student, student_codes(student, variables))
    assert [row["layer"] for row in rows] == [layer.name for layer in student.graph.weighted]
    assert rows[-1]["output_bits"] is None
    assert rows[-1]["high"] is None
    for row in rows[:-1]:
        assert row["low"] < row["high"]
        assert 1 <= row["codes_used"] <= 16


def test_a_paper_student_has_facts_too():
    student, variables, _ = calibrated(resnet_like, 4)
    paper = dataclasses.replace(student, spec=dataclasses.replace(student.spec, placement="paper"))
    images = np.asarray(random_images(3))
    _, ranged = jax.jit(lambda v, x: calibrate(paper, v, x))(
        paper.initial_variables(variables), images
    )
    facts = measure(
        paper, ranged, student_codes(paper, ranged), teacher_variables=variables, images=images,
        labels=np.zeros(len(images), int), data=None, preprocessing=None,
    ).facts  # fmt: skip
    assert all(5 < row["sqnr_db"] < 60 for row in facts["layers"])
    assert facts["size"]["bytes"] < facts["size"]["float_bytes"]


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_the_same_page_again(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run[0].path, run)
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert command.main([str(run)]) == 0
    assert (run / "report.html").read_bytes() == before
    assert "report.html" in capsys.readouterr().out


def test_an_old_run_has_a_page_that_says_what_is_missing(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run[0].path, run)
    report = json.loads((run / "report.json").read_text())
    for name in ("layers", "size", "batch_norms", "histogram", "synthetic", "command",
                 "disagreements"):  # fmt: skip
        del report[name]
    (run / "report.json").write_text(json.dumps(report))
    (run / "report.npz").unlink()
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "images")
    page = Page(write_page(run).read_text(encoding="utf-8"))
    text = " ".join(page.loose)
    assert "kept no metrics" in text
    assert "kept no images" in text
    assert "did not yet" in text
    assert page.resources == ["data:,"]


def test_a_warning_of_the_run_stands_on_the_page(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run[0].path, run)
    assert "Careful" not in (run / "report.html").read_text(encoding="utf-8")
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "warnings": ["fed wrongly"]}))
    page = Page(write_page(run).read_text(encoding="utf-8"))
    assert "Careful:" in " ".join(page.loose)
    assert ["warnings/0", '"fed wrongly"', "fed wrongly"] in page.values


def test_without_a_run_the_command_says_what_makes_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 2
    error = capsys.readouterr().err
    assert "no run at 'runs/latest'" in error
    assert "python -m lrq_jax.main" in error
    assert len(error.splitlines()) <= 3


def test_an_export_has_no_page_of_a_run(tiny_run, tmp_path, capsys):
    tiny_run[0].export(tmp_path / "out", targets=("orbax",))
    assert command.main([str(tmp_path / "out")]) == 2
    assert "found an export, expected the directory of the run" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


# --- in a real browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, offline."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver here: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--host-resolver-rules=MAP * ~NOTFOUND"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()


@pytest.mark.parametrize("width", [1200, 390], ids=["desk", "phone"])
def test_it_opens_in_a_browser(browser, tiny_run, tmp_path, width):
    # Chromium's window is no narrower than 500 px; the page's own width is what counts.
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get((tiny_run[0].path / "report.html").resolve().as_uri())
    loaded = browser.execute_script(
        "return [...document.images].map(i => i.complete && i.naturalWidth > 0)"
    )
    assert len(loaded) >= 27
    assert all(loaded)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.find_element("css selector", "h1").text.startswith("tiny W3A5")
    browser.save_screenshot(str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_it_prints(browser, tiny_run):
    browser.get((tiny_run[0].path / "report.html").resolve().as_uri())
    pdf = browser.print_page()
    assert len(pdf) > 10_000

"""Benchmarks: what they measure can still be made."""

import sys
from pathlib import Path

import pytest

from lrq_jax.verify import main as verify

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def latency(monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])
    import latency
    import subjects

    return latency, subjects


def test_the_network_that_is_timed_is_an_export_like_any_other(latency, tmp_path):
    benchmark, subjects = latency
    subject = subjects.topology("resnet20_cifar", 32, count=64)(tmp_path)
    assert verify([str(benchmark.exported(subject, tmp_path))]) == 0

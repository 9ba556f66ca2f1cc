"""torchvision for the tests that compare with its networks."""

import functools
import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="compares with PyTorch's classes: pip install torch")

REASON = "compares with torchvision's classes: pip install torchvision"


@functools.cache
def load_torchvision():
    """The package, also where its compiled operators do not load: no network here uses them."""
    found = importlib.util.find_spec("torchvision")
    if found is None:
        pytest.skip(REASON)
    try:
        torch.ops.load_library(next(Path(found.origin).parent.glob("_C*")))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        load_torchvision.library = library  # kept alive
    return importlib.import_module("torchvision")

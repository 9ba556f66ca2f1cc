"""The project's networks as torchvision and timm define them, through ONNX and back.

    pip install torch torchvision timm && python -m pytest tests/test_onnx_networks.py

About half a minute a network on one CPU core, most of it compiling.
"""

import importlib.util

import jax
import numpy as np
import pytest

WHY = "exports torchvision's and timm's networks: pip install torch torchvision timm"
pytest.importorskip("onnx", reason="reads ONNX: pip install '.[dev]'")
pytest.importorskip("onnxruntime", reason="reads ONNX: pip install '.[dev]'")
torch = pytest.importorskip("torch", reason=WHY)
for package in ("torchvision", "timm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(WHY, allow_module_level=True)

from onnx_models import run  # noqa: E402
from torchvision_module import load_torchvision  # noqa: E402

from lrq_jax.passes import float_logits  # noqa: E402
from lrq_jax.readers.onnx_graph import read_onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters warn of their own ways

NETWORKS = {
    **{f"torchvision resnet{depth}": 64 for depth in (18, 34, 50, 101)},
    # torch exports VGG's adaptive pool only where it has nothing to do.
    **{f"torchvision vgg{depth}_bn": 224 for depth in (11, 13, 16, 19)},
    "torchvision mobilenet_v2": 64,
    "torchvision shufflenet_v2_x0_5": 64,
    "torchvision shufflenet_v2_x1_0": 64,
    "torchvision inception_v3": 96,
    "torchvision densenet121": 64,
    "timm resnet50c": 64,
    "timm mobilenetv1_100": 64,
    "timm mobilenetv2_050": 64,
    "timm regnetx_006": 64,
    "timm tf_efficientnet_lite0": 64,
    "timm tf_efficientnet_lite1": 64,
    "timm tf_efficientnet_lite2": 64,
}
"""Package and name there, side of the images in pixels."""


def made(network):
    """The model in evaluation mode, random weights and statistics of random images."""
    package, name = network.split()
    tv = load_torchvision()  # timm imports it
    torch.manual_seed(0)
    if package == "timm":
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=10)
    else:
        extra = {"aux_logits": False, "init_weights": False} if "inception" in name else {}
        model = tv.models.get_model(name, weights=None, num_classes=10, **extra)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            torch.nn.init.normal_(module.bias, 0, 0.1)  # zeros would be read as no bias
    model.train()
    with torch.no_grad():
        model(torch.randn(8, 3, NETWORKS[network], NETWORKS[network]))
    return model.eval()


@pytest.mark.parametrize("network", NETWORKS)
def test_network_through_onnx_is_the_same(network, tmp_path):
    model, side = made(network), NETWORKS[network]
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.zeros(1, 3, side, side),), str(path), dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
    )  # fmt: skip
    read = read_onnx(path)
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert len(read.graph.batch_norms) == norms
    parameters = sum(p.numel() for p in model.parameters())
    assert read.graph.num_parameters() == parameters
    images = np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32)
    fed = np.ascontiguousarray(np.moveaxis(images, -1, 1))
    others = run(path, fed), torch_logits(model, fed)
    with jax.enable_x64(True):
        exact = torch_logits(model.double(), np.float64(fed))
        scale = np.abs(exact).max()
        doubles = jax.tree.map(np.float64, read.variables)
        assert np.abs(logits(read.graph, doubles, np.float64(images)) - exact).max() <= 1e-6 * scale
    found = logits(read.graph, read.variables, images)
    # A hundred layers amplify what float32 rounds: onnxruntime and torch differ by 1.7e-4.
    theirs = max(np.abs(other - exact).max() for other in others)
    assert np.abs(found - exact).max() <= max(1e-4 * scale, theirs)
    assert theirs <= 3e-4 * scale


def torch_logits(model, images):
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def logits(graph, variables, images):
    return np.asarray(jax.jit(lambda v, x: float_logits(graph, v, x))(variables, images))

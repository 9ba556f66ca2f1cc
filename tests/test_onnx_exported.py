"""Files as torch's two exporters really write them; needs torch, which nothing else here does.

pip install torch onnxscript && python -m pytest tests/test_onnx_exported.py
"""

import numpy as np
import pytest

WHY = "exports with PyTorch: pip install torch onnxscript"
onnx = pytest.importorskip("onnx", reason="reads ONNX: pip install '.[dev]'")
pytest.importorskip("onnxruntime", reason="reads ONNX: pip install '.[dev]'")
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("onnxscript", reason=WHY)

import jax.numpy as jnp  # noqa: E402
from onnx_models import run  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from lrq_jax.graph import layers as L  # noqa: E402
from lrq_jax.networks import build_network  # noqa: E402
from lrq_jax.passes import float_logits  # noqa: E402
from lrq_jax.readers import ReaderError  # noqa: E402
from lrq_jax.readers.onnx_graph import read_onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters warn of their own ways

# --- akamaster/pytorch_resnet_cifar10, as published ----------------------------------------------


class LambdaLayer(nn.Module):
    def __init__(self, lambd):
        super().__init__()
        self.lambd = lambd

    def forward(self, x):
        return self.lambd(x)


class BasicBlock(nn.Module):
    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            amounts = (0, 0, 0, 0, planes // 4, planes // 4)
            self.shortcut = LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], amounts, "constant", 0))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, num_blocks, num_classes=10):
        super().__init__()
        self.in_planes = 16
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(16, num_blocks[0], 1)
        self.layer2 = self._make_layer(32, num_blocks[1], 2)
        self.layer3 = self._make_layer(64, num_blocks[2], 2)
        self.linear = nn.Linear(64, num_classes)

    def _make_layer(self, planes, num_blocks, stride):
        layers = []
        for step in [stride] + [1] * (num_blocks - 1):
            layers.append(BasicBlock(self.in_planes, planes, step))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


# --- the other forms -----------------------------------------------------------------------------


class Mobile(nn.Module):
    """Hard swish, squeeze and excitation, relu6, SiLU; dense head with dropout."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.deep, self.deep_norm = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8)
        self.less, self.more = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Sequential(
            nn.Linear(8 * 4 * 4, 12), nn.SiLU(), nn.Dropout(), nn.Linear(12, 5)
        )

    def forward(self, x):
        x = F.hardswish(self.norm(self.stem(x)))
        y = F.relu6(self.deep_norm(self.deep(x)))
        gate = F.hardsigmoid(self.more(F.relu(self.less(F.adaptive_avg_pool2d(y, 1)))))
        x = F.max_pool2d(F.leaky_relu(x + y * gate, 0.1), 3, 2, 1)
        return self.head(torch.flatten(x, 1))


class Shuffled(nn.Module):
    """ShuffleNetV2's unit: chunk, concat, view-transpose-view; mean over axes; prefix inside."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.branch, self.branch_norm = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(8, 5)
        self.register_buffer("pixel_mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1))

    def forward(self, x):
        x = F.relu(self.norm(self.stem((x - self.pixel_mean) / self.pixel_std)))
        for _ in range(2):
            a, b = x.chunk(2, dim=1)
            x = torch.cat((a, F.silu(self.branch_norm(self.branch(b)))), dim=1)
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w)
            x = torch.transpose(x, 1, 2).contiguous().view(n, -1, h, w)
        return self.fc(x.mean([2, 3]))


NETWORKS = {
    "resnet20": (lambda: ResNet([3, 3, 3]), 32),
    "mobile": (Mobile, 16),
    "shuffled": (Shuffled, 16),
}


def older(model, images, path, *, training="PRESERVE", fold=False, dynamic=True):
    torch.onnx.export(
        model, (images,), path, dynamo=False, do_constant_folding=fold,
        training=getattr(torch.onnx.TrainingMode, training), input_names=["input"],
        dynamic_axes={"input": {0: "batch"}} if dynamic else None,
    )  # fmt: skip


def newer(model, images, path, *, optimize=False, dynamic=True):
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.onnx.export(model, (images,), path, dynamo=True, optimize=optimize, dynamic_shapes=shapes)


def made(name):
    """A model with random weights and random statistics, and the side of its images."""
    torch.manual_seed(0)
    build, side = NETWORKS[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model, side


@pytest.mark.parametrize("dynamic", [True, False], ids=["open batch", "fixed batch"])
@pytest.mark.parametrize("exporter", [older, newer])
@pytest.mark.parametrize("name", NETWORKS)
def test_exported_network_is_read_whole(name, exporter, dynamic, tmp_path):
    model, side = made(name)
    batch = 2 if dynamic else 1
    images = torch.randn(batch, 3, side, side)
    path = tmp_path / f"{name}.onnx"
    exporter(model, images, str(path), dynamic=dynamic)
    network = read_onnx(path)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    uses = {"resnet20": 19, "mobile": 2, "shuffled": 3}[name]  # a shared one counts each time
    assert len(network.graph.batch_norms) == uses
    for layer, norm in zip(network.graph.batch_norms, norms, strict=False):
        stats = network.variables["batch_stats"][layer.name]
        np.testing.assert_array_equal(stats["mean"], norm.running_mean.numpy())
        np.testing.assert_array_equal(stats["var"], norm.running_var.numpy())
    ours = np.moveaxis(images.numpy(), 1, -1)
    if network.scale is not None:
        ours = np.float32(ours * network.scale + network.shift)
    found = np.asarray(float_logits(network.graph, network.variables, jnp.asarray(ours)))
    for expected in (run(path, images.numpy()), model(images).detach().numpy()):
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("exporter", [older, newer])
def test_resnet20_is_the_graph_our_own_builder_makes(exporter, tmp_path):
    """The option-A shortcut, however it was spelled, is a slice and zero channels again."""
    model, side = made("resnet20")
    exporter(model, torch.randn(2, 3, side, side), str(tmp_path / "m.onnx"))
    network = read_onnx(tmp_path / "m.onnx")
    ours = build_network("resnet20_cifar")
    plain = (L.Flatten, L.GlobalPool)

    def described(graph):
        return sorted(
            (type(layer).__name__, graph.shapes[layer.name])
            for layer in graph.layers if not isinstance(layer, plain)
        )  # fmt: skip

    def stepped(graph):  # slices of two exporters come one axis at a time
        return [entry for entry in described(graph) if entry[0] != "Slice"]

    assert stepped(network.graph) == stepped(ours)
    assert any(isinstance(layer, L.Pad) for layer in network.graph.layers)
    assert network.graph.num_parameters() == ours.num_parameters()


@pytest.mark.parametrize(
    "export",
    [
        lambda *a: older(*a, training="EVAL", fold=True),
        lambda *a: newer(*a, optimize=True),
    ],
    ids=["older", "newer"],
)
def test_exporters_defaults_fold_batch_norms_and_are_refused(export, tmp_path):
    model, side = made("resnet20")
    export(model, torch.randn(2, 3, side, side), str(tmp_path / "m.onnx"))
    with pytest.raises(ReaderError, match="export again with batch norms kept"):
        read_onnx(tmp_path / "m.onnx")
    assert not read_onnx(tmp_path / "m.onnx", assume_bn="unit").graph.batch_norms


@pytest.mark.parametrize(
    "settings",
    [
        {"training": "PRESERVE", "fold": True},
        {"training": "PRESERVE", "fold": False},
        {"training": "EVAL", "fold": False},
    ],
)
def test_settings_that_keep_batch_norms(settings, tmp_path):
    model, side = made("mobile")
    older(model, torch.randn(2, 3, side, side), str(tmp_path / "m.onnx"), **settings)
    assert len(read_onnx(tmp_path / "m.onnx").graph.batch_norms) == 2


def test_a_model_exported_in_training_mode_is_refused(tmp_path):
    model, side = made("mobile")
    older(model.train(), torch.randn(2, 3, side, side), str(tmp_path / "m.onnx"))
    with pytest.raises(ReaderError, match=r"training_mode 1.*model\.eval\(\)"):
        read_onnx(tmp_path / "m.onnx")

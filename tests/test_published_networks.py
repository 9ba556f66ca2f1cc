"""Our networks against the classes their files were made with: names, weights, arithmetic.

Every case draws random weights and random batch-norm statistics, takes the state dict as the
package names it, finds the network in it and compares the logits.
"""

import jax
import numpy as np
import pytest

from lrq_jax.networks import build_network
from lrq_jax.passes import float_logits
from lrq_jax.readers import ReaderError, unwrap_state_dict
from lrq_jax.readers.detection import best_match, detect_match, fit_graph
from lrq_jax.readers.names import match_variables

torch = pytest.importorskip("torch", reason="compares with PyTorch's classes: pip install torch")

from torchvision_module import load_torchvision  # noqa: E402

# (package, name there, our name, input size); names beginning with ! do not decide our network.
CASES = [
    *(("torchvision", arch, arch, 64) for arch in ("resnet18", "resnet34", "resnet50", "resnet101")),
    *(("torchvision", f"vgg{depth}_bn", f"vgg{depth}_bn", 224) for depth in (11, 13, 16, 19)),
    ("torchvision", "mobilenet_v2", "mobilenet_v2", 65),
    *(("torchvision", arch, arch, 65) for arch in ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
                                                    "shufflenet_v2_x1_5", "shufflenet_v2_x2_0")),
    ("torchvision", "regnet_x_400mf", "regnet_x_400mf_tv", 64),
    *(("torchvision", arch, arch, 64) for arch in ("regnet_x_800mf", "regnet_x_1_6gf",
                                                    "regnet_x_3_2gf", "regnet_x_8gf")),
    ("torchvision", "inception_v3", "inception_v3", 107),
    ("torchvision", "densenet121", "densenet121", 64),
    ("torchvision", "densenet169", "densenet169", 64),
    ("timm", "resnet50", "resnet50", 64),
    ("timm", "vgg11_bn", "vgg11_bn", 224),
    ("timm", "mobilenetv1_100", "mobilenet_v1", 64),
    *(("timm", f"mobilenetv2_{width}", "mobilenet_v2", 64) for width in ("035", "050", "075", "100", "140")),
    ("timm", "tf_efficientnet_lite0", "!efficientnet_lite0", 64),
    ("timm", "tf_efficientnet_lite0", "!efficientnet_lite0", 75),
    ("timm", "efficientnet_lite0", "!efficientnet_lite0_timm", 64),
    ("timm", "tf_efficientnet_lite1", "efficientnet_lite1", 60),
    ("timm", "tf_efficientnet_lite2", "efficientnet_lite2", 65),
    ("timm", "tf_efficientnet_lite3", "efficientnet_lite3", 64),
    ("timm", "tf_efficientnet_lite4", "efficientnet_lite4", 64),
    *(("timm", f"regnetx_{ours}", f"regnet_x_{theirs}", 64) for ours, theirs in (
        ("002", "200mf"), ("004", "400mf"), ("006", "600mf"), ("032", "3_2gf"), ("040", "4gf"),
        ("064", "6_4gf"))),
    ("timm", "inception_v3", "inception_v3", 107),
    ("timm", "densenet121", "densenet121", 64),
    ("pytorchcv", "resnet18", "resnet18", 64),
    ("pytorchcv", "resnet50", "!resnet50_v1", 64),
    ("pytorchcv", "resnet50b", "!resnet50", 64),
    ("pytorchcv", "resnet20_cifar10", "resnet20_cifar_b", 32),
    ("pytorchcv", "bn_vgg11", "vgg11_bn", 224),
    ("pytorchcv", "bn_vgg11b", "vgg11_bn", 224),
    *(("pytorchcv", f"mobilenet_{width}", "mobilenet_v1", 64) for width in ("w1", "w3d4", "wd2", "wd4")),
    *(("pytorchcv", f"mobilenetv2{b}_{width}", "mobilenet_v2", 64) for b in ("", "b") for width in ("w1", "wd2", "wd4")),
    *(("pytorchcv", f"shufflenetv2_{width}", f"shufflenet_v2_x{ours}", size)
      for width, ours, size in (("wd2", "0_5", 64), ("w1", "1_0", 64), ("w3d2", "1_0", 65), ("w2", "1_0", 66))),
    ("pytorchcv", "regnetx006", "regnet_x_600mf", 64),
    ("pytorchcv", "inceptionv3", "inception_v3", 107),
    ("pytorchcv", "densenet121", "densenet121", 64),
]  # fmt: skip


def make(package, name):
    reason = f"compares with {package}'s class: pip install {package}"
    torchvision = load_torchvision()  # the others import it
    if package == "pytorchcv":
        provider = pytest.importorskip("pytorchcv.model_provider", reason=reason)
        model = provider.get_model(name)
        if isinstance(getattr(model.features, "final_pool", None), torch.nn.AvgPool2d):
            # The same at its only size, and a mean at the smaller ones of these tests.
            model.features.final_pool = torch.nn.AdaptiveAvgPool2d(1)
        return model
    if package == "timm":
        return pytest.importorskip("timm", reason=reason).create_model(name)
    extra = {"init_weights": False} if name == "inception_v3" else {}
    return getattr(torchvision.models, name)(**extra)


def randomise(model):
    """Weights that keep the scale of their input, statistics that no layer would have alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                fan = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize(("package", "name", "arch", "size"), CASES)
@pytest.mark.filterwarnings("ignore")  # those of the other packages
def test_files_of_other_packages_are_found_and_computed_as_there(package, name, arch, size):
    model = randomise(make(package, name))
    state, _ = unwrap_state_dict({key: value.numpy() for key, value in model.state_dict().items()})
    if arch.startswith("!"):
        arch = arch[1:]
        with pytest.raises(ReaderError, match=rf"'{arch}'.*choose with --arch"):
            detect_match(state)
        match = best_match(arch, state)
    else:
        match = detect_match(state)
        assert match.arch == arch
    assert match.lines == []
    settings = {**match.settings, "input_shape": (size, size, 3)}
    graph, _ = fit_graph(build_network(match.arch, **settings), match.naming, state)
    variables = match_variables(graph, state, namings=(match.naming,))
    images = np.random.default_rng(1).standard_normal((2, size, size, 3), np.float32)
    ours = np.asarray(jax.jit(lambda x: float_logits(graph, variables, x))(images))
    if name == "inception_v3" and package == "torchvision":
        # Its normalisation belongs to our preprocessing.
        assert not model.transform_input
    with torch.inference_mode():
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert theirs.std() > 0

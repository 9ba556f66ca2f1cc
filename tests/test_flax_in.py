"""Flax's checkpoints: msgpack, orbax and flat archives of ResNets, compared with linen."""

import functools
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import serialization, traverse_util
from flax.training import train_state

from lrq_jax.graph import GraphBuilder
from lrq_jax.networks import build_network
from lrq_jax.passes.float_forward import float_logits
from lrq_jax.readers import ReaderError, convert_teacher, load_teacher, save_teacher
from lrq_jax.readers.padding import with_tf_same

pytestmark = pytest.mark.usefixtures("quick_compilation")

GIVEN = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

# --- the reference: ResNets as in flax's examples/imagenet/models.py -----------------------------


class ResNetBlock(nn.Module):
    filters: int
    conv: object
    norm: object
    strides: tuple = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.filters, (3, 3))(y))
        if x.shape != y.shape:
            x = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class BottleneckResNetBlock(nn.Module):
    filters: int
    conv: object
    norm: object
    strides: tuple = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm()(self.conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    stages: tuple
    block: type
    classes: int = 5

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=True, momentum=0.9, epsilon=1e-5)
        x = conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                strides = (2, 2) if stage > 0 and block == 0 else (1, 1)
                x = self.block(64 * 2**stage, strides=strides, conv=conv, norm=norm)(x)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


MODELS = {
    "resnet18": ResNet((2, 2, 2, 2), ResNetBlock),
    "resnet50": ResNet((3, 4, 6, 3), BottleneckResNetBlock),
}


@functools.cache
def variables_of(arch):
    """Random weights and statistics, as numpy."""
    shapes = jax.eval_shape(MODELS[arch].init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(7)

    def make(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return (rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(
                "f4"
            )
        if name in ("scale", "var"):
            return rng.uniform(0.3, 1.2, leaf.shape).astype("f4")
        return (0.2 * rng.normal(size=leaf.shape)).astype("f4")

    return jax.tree_util.tree_map_with_path(make, shapes)


def wrapped(variables):
    """As examples/imagenet keeps it: a TrainState with step and optimizer."""

    class TrainState(train_state.TrainState):
        batch_stats: object = None

    return TrainState(step=3, apply_fn=None, params=variables["params"], tx=None,
                      opt_state={"momentum": {"params": np.zeros(2, np.float32)}},
                      batch_stats=variables["batch_stats"])  # fmt: skip


def write(folder, form, variables):
    """A checkpoint in one form; returns where it is."""
    if form in ("msgpack", "state msgpack"):
        tree = variables if form == "msgpack" else wrapped(variables)
        path = folder / ("weights.msgpack" if form == "msgpack" else "checkpoint_3")
        path.write_bytes(serialization.to_bytes(tree))
        return path
    if form in ("npz", "npz without collections"):
        flat = traverse_util.flatten_dict(variables, sep="/")
        if form != "npz":
            flat = {name.partition("/")[2]: array for name, array in flat.items()}
        np.savez(folder / "weights.npz", **flat)
        return folder / "weights.npz"
    path = folder / "orbax"
    if form == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, variables)
    else:
        state = serialization.to_state_dict(wrapped(variables))
        with ocp.CheckpointManager(path) as manager:
            for step in (9, 10):
                params = {**state["params"], "Dense_0": jax.tree.map(
                    lambda leaf, step=step: leaf * (step == 10), state["params"]["Dense_0"])}  # fmt: skip
                tree = {**state, "params": params, "step": step}
                manager.save(step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()
    return path


FORMS = ("msgpack", "state msgpack", "npz", "npz without collections", "orbax", "orbax steps")


@pytest.mark.parametrize("arch", MODELS)
def test_a_flax_resnet_is_read_as_linen_computes_it(tmp_path, rng, arch):
    variables = variables_of(arch)
    # Even sizes at every strided window (32, 16, 8, 4, 2): there SAME is not symmetric.
    teacher = convert_teacher(write(tmp_path, "msgpack", variables), size=32, **GIVEN)
    assert teacher.arch == arch
    x = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected = jax.jit(MODELS[arch].apply)(variables, x)
    found = jax.jit(functools.partial(float_logits, teacher.graph))(teacher.variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert teacher.graph.by_name["conv1"].padding == ((3, 3), (3, 3))
    assert teacher.graph.by_name["maxpool"].padding == ((0, 1), (0, 1))
    assert teacher.graph.by_name["stage2_block0_conv" + ("1" if arch == "resnet18" else "2")].padding == ((0, 1), (0, 1))  # fmt: skip
    if arch == "resnet18":
        save_teacher(teacher, tmp_path / "teacher")
        assert load_teacher(tmp_path / "teacher").graph == teacher.graph


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_variables(tmp_path, form):
    variables = variables_of("resnet18")
    teacher = convert_teacher(write(tmp_path, form, variables), size=32, **GIVEN)
    theirs = variables["params"]["ResNetBlock_2"], variables["batch_stats"]["ResNetBlock_2"]
    ours = teacher.variables["params"], teacher.variables["batch_stats"]
    np.testing.assert_array_equal(
        ours[0]["stage2_block0_conv2"]["kernel"], theirs[0]["Conv_1"]["kernel"]
    )
    np.testing.assert_array_equal(
        ours[1]["stage2_block0_shortcut_bn"]["var"], theirs[1]["norm_proj"]["var"]
    )
    np.testing.assert_array_equal(
        ours[0]["stage2_block0_bn1"]["scale"], theirs[0]["BatchNorm_0"]["scale"]
    )
    assert ours[0]["classifier"]["kernel"].any()  # the last step's, where there are several
    assert len(teacher.source_sha256) == 64
    if "state" in form or "steps" in form:
        assert any("left out" in note and "opt_state" in note for note in teacher.notes) or "orbax" in form  # fmt: skip
    if form == "orbax steps":
        assert "took step 10 of [9, 10]" in teacher.notes


def test_imagenet_preprocessing_is_that_of_the_example(tmp_path):
    model = ResNet((2, 2, 2, 2), ResNetBlock, classes=1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, jnp.bfloat16), shapes)
    teacher = convert_teacher(write(tmp_path, "msgpack", variables))
    how = teacher.preprocessing
    assert (how.size, how.resize, how.interpolation) == (224, 256, "bicubic")
    assert how.mean == (0.485, 0.456, 0.406)
    assert teacher.variables["params"]["conv1"]["kernel"].dtype == np.float32


def test_arrays_named_as_our_own_layers(tmp_path):
    graph = build_network("resnet8_cifar", num_classes=4)
    flat = {f"{c}/{layer}/{v}": np.ones(shape, np.float32) for c, layers in graph.variable_shapes().items()
            for layer, shapes in layers.items() for v, shape in shapes.items()}  # fmt: skip
    np.savez(tmp_path / "w.npz", **flat)
    teacher = convert_teacher(tmp_path / "w.npz", "resnet8_cifar", **GIVEN)
    assert teacher.graph == graph
    with pytest.raises(
        ReaderError, match=r"^w\.npz: found names such as .*examples/imagenet.*--arch"
    ):
        convert_teacher(tmp_path / "w.npz", **GIVEN)


def test_npz_with_pytorchs_names_is_read_as_a_state_dict(tmp_path, rng):
    graph = build_network("resnet8_cifar_b", num_classes=10)
    shapes = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}  # fmt: skip
    state = {}
    for layers in graph.variable_shapes().values():
        for layer, variables in layers.items():
            stage, _, rest = layer.partition("_block")
            name = layer.replace("classifier", "linear")
            if rest:
                block, _, inner = rest.partition("_")
                inner = inner.replace("shortcut_conv", "shortcut.0").replace(
                    "shortcut_bn", "shortcut.1"
                )
                name = f"layer{stage[-1]}.{block}.{inner}"
            for variable, shape in variables.items():
                order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(shape)]
                array = rng.uniform(0.5, 1, shape).astype(np.float32).transpose(order)
                state[f"module.{name}.{shapes[variable]}"] = array
    np.savez_compressed(tmp_path / "w.npz", **state)
    teacher = convert_teacher(tmp_path / "w.npz", "resnet8_cifar_b", **GIVEN)
    np.testing.assert_array_equal(
        teacher.variables["params"]["conv1"]["kernel"],
        state["module.conv1.weight"].transpose(2, 3, 1, 0),
    )
    assert any("prefix 'module.'" in note for note in teacher.notes)


# --- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 9])
def test_tf_same_pads_as_lax_does(size):
    net = GraphBuilder("n", input_shape=(size, size, 4))
    x = net.conv(net.image, 4, 3, strides=2, name="c")
    x = net.conv(x, 4, 5, strides=2, groups=4, name="kept")
    x = net.conv(x, 4, 3, dilation=2, name="d")
    x = net.conv(x, 4, 3, padding=0 if size == 9 else 1, name="valid")
    net.dense(net.global_pool(net.max_pool(x, 1, strides=1)), 2)
    graph = with_tf_same(net.build(), keep=("kept",))
    expected = jax.lax.padtype_to_pads((size, size), (3, 3), (2, 2), "SAME")
    assert graph.by_name["c"].padding == tuple(map(tuple, expected))
    assert graph.by_name["kept"].padding == ((2, 2), (2, 2))
    assert graph.by_name["d"].padding == ((2, 2), (2, 2))
    assert graph.by_name["valid"].padding == (((0, 0), (0, 0)) if size == 9 else ((1, 1), (1, 1)))


# --- what is refused -----------------------------------------------------------------------------


def changed(**changes):
    flat = dict(traverse_util.flatten_dict(variables_of("resnet18"), sep="/"))
    for name, make in changes.items():
        name = name.replace("__", "/")
        value = make(flat.get(name))
        if value is None:
            del flat[name]
        else:
            flat[name] = value
    return flat


@pytest.mark.parametrize(("changes", "message"), [
    ({"params__conv_init__kernel": lambda a: a[1:]}, r"wrong shape: 'params/conv_init/kernel' is \(6, 7"),
    ({"batch_stats__bn_init__mean": lambda a: None}, "missing in the file: 'batch_stats/bn_init/mean'"),
    ({"params__more__kernel": lambda a: np.ones(3, np.float32)}, "in the file only: 'params/more/kernel'"),
    ({"batch_stats__bn_init__var": lambda a: -a}, "negative variance in 'batch_stats/bn_init/var'"),
    ({"params__bn_init__bias": lambda a: a * np.nan}, "NaN"),
    ({"params__bn_init__bias": lambda a: a.astype(int)}, "int64 'params/bn_init/bias'"),
    ({"params__Dense_0__kernel": lambda a: None}, "no classifier 'Dense_0'"),
    ({"params__ResNetBlock_8__Conv_0__kernel": lambda a: np.ones((3, 3, 3, 7), np.float32)},
     r"\['ResNetBlock'\] in stages of \(1, 2, 2, 2, 2\), expected a ResNet-18"),
    ({"params__conv_init": lambda a: np.ones(3, np.float32)}, "below an array|array and a folder"),
])  # fmt: skip
def test_arrays_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    np.savez(tmp_path / "w.npz", **changed(**changes))
    with pytest.raises(ReaderError, match=rf"^w\.npz: (.|\n)*({message})"):
        convert_teacher(tmp_path / "w.npz", size=32, **GIVEN)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    path = write(tmp_path, "msgpack", variables_of("resnet18"))

    def refused(message, arch=None, **options):
        with pytest.raises(ReaderError, match=message):
            convert_teacher(path, arch, **options)

    refused("5 classes, for which Flax publishes no normalisation")
    refused("5 classes in the file, expected the 7", num_classes=7, **GIVEN)
    refused("differences between the file and network 'resnet34'", "resnet34", size=32, **GIVEN)
    refused(r"found layer '.*conv.*expected those of a ResNet", "mobilenet_v2", size=32, **GIVEN)
    refused("only one of", mean=(0, 0, 0))
    refused("divide", mean=(127, 127, 127), std=(1, 1, 1))


class Bait:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


def test_pickles_in_an_npz_are_never_loaded(tmp_path):
    objects = np.array([Bait(tmp_path / "made")], dtype=object)
    np.savez(tmp_path / "w.npz", **{"params/conv/kernel": objects})
    with pytest.raises(
        ReaderError, match=r"^w\.npz: found pickled objects.*never loaded.*np\.savez"
    ):
        convert_teacher(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", pickle.dumps(Bait(tmp_path / "made")))
    with pytest.raises(ReaderError, match="no NumPy array"):
        convert_teacher(tmp_path / "w.npz")
    assert not (tmp_path / "made").exists()


def header(shape, descr="<f4"):
    text = (
        repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117).encode() + b"\n"
    )
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_npz_files_that_claim_more_than_they_hold(tmp_path):
    path = tmp_path / "w.npz"

    def refused(message, *members):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members:
                archive.writestr(name, data)
        with pytest.raises(ReaderError, match=message):
            convert_teacher(path)

    refused(r"found 8 bytes of 'a.npy' \(1099511627776,\), expected 4398046511104",
            ("a.npy", header((1 << 40,)) + bytes(8)))  # fmt: skip
    refused("that unpacks to 100", ("a.npy", header((25 * 10**5,)) + bytes(10**7)))
    refused("pickled objects", ("a.npy", header((1,), "|O") + bytes(8)))
    refused(
        "dtype .V2, expected numbers: NumPy cannot keep bfloat16",
        ("a.npy", header((4,), "|V2") + bytes(8)),
    )
    refused("no NumPy array", ("a.npy", b"\x93NUMPY\x01\x00\xff\xff" + bytes(8)))
    refused("no NumPy array", ("a.npy", header((1,)).replace(b"{", b"(") + bytes(4)))
    refused("no NumPy array", ("a.npy", b"hello"))
    for data in (b"", b"hello", bytes(300)):
        path.write_bytes(data)
        with pytest.raises(ReaderError, match=r"^w\.npz: found a truncated or damaged"):
            convert_teacher(path)
    with pytest.raises(FileNotFoundError, match="none"):
        convert_teacher(tmp_path / "none.npz")


@pytest.mark.parametrize("name", ["w.npz", "w.msgpack"])
def test_a_file_cut_anywhere_is_an_error(tmp_path, name):
    tree = {"params": {"a": {"kernel": np.ones((3, 4), np.float32)}}}
    if name == "w.npz":
        np.savez(tmp_path / name, **traverse_util.flatten_dict(tree, sep="/"))
    else:
        (tmp_path / name).write_bytes(serialization.to_bytes(tree))
    data = (tmp_path / name).read_bytes()
    for length in [*range(0, len(data), 5), len(data) - 1]:
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(ReaderError, match=r"^w\.(npz|msgpack): found a (truncated|damaged)"):
            convert_teacher(tmp_path / name)


def test_msgpack_files_that_are_no_variables(tmp_path):
    path = tmp_path / "w.msgpack"
    array = b"\xc7"  # an extension of a length that is given next
    for data, message in (
        (b"\xdd\xff\xff\xff\xff", "damaged msgpack"),  # a list of 2**32 - 1
        (b"\xc6\xff\xff\xff\xff", "damaged msgpack"),  # as many bytes
        (b"\x91" * 5000 + b"\x01", "damaged msgpack"),
        (array + b"\x05\x01hello", "damaged msgpack"),
        (serialization.msgpack_serialize({"a": 1}), r"a tree of \['a'\]"),
        (
            serialization.msgpack_serialize({"params": {"a": {"kernel": "x"}}}),
            "expected a float array",
        ),
        (serialization.msgpack_serialize({"params": {}}), "names such as"),
        (b"\x01", "found a int"),
    ):
        path.write_bytes(data)
        with pytest.raises(ReaderError, match=rf"^w\.msgpack: found .*{message}|{message}"):
            convert_teacher(path)
    with pytest.raises(FileNotFoundError, match="none"):
        convert_teacher(tmp_path / "none.msgpack")


def test_orbax_directories_that_are_damaged_or_point_elsewhere(tmp_path):
    tree = {"params": {"Dense_0": {"kernel": np.ones((3, 4), np.float32)}}}
    path = write(tmp_path, "orbax", tree)

    def refused(message):
        with pytest.raises(ReaderError, match=rf"^orbax: found {message}"):
            convert_teacher(path)

    refused("names such as")  # it is read, and is no ResNet
    metadata = (path / "_METADATA").read_text()
    (path / "_METADATA").write_text(metadata.replace("Dense_0", "../Dense_0"))
    refused(r"an array named '\.\./Dense_0'")
    (path / "_METADATA").write_text(metadata.replace("Dense_0", "Dense_1"))
    refused("a damaged orbax checkpoint")
    (path / "_METADATA").write_text(metadata[:40])
    refused("a damaged orbax checkpoint")
    (path / "_METADATA").write_text(metadata)
    (path / "d" / "link").symlink_to("/etc/hostname")
    refused("a link 'link'")
    (path / "d" / "link").unlink()
    for file in path.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused("a damaged orbax checkpoint")
    (path / "_METADATA").unlink()
    refused("a directory of .*expected an orbax checkpoint")

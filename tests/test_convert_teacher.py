"""From a state dict to a teacher: names, detection, what is kept on disk, the command."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lrq_jax.data import Preprocessing
from lrq_jax.graph import GraphBuilder, graph_to_dict
from lrq_jax.networks import FAMILIES, build_network
from lrq_jax.readers import (
    ReaderError,
    Teacher,
    convert_teacher,
    describe,
    detect_arch,
    load_teacher,
    match_variables,
    save_embedded,
    save_teacher,
    store,
    teacher_hash,
    unwrap_state_dict,
)
from lrq_jax.readers.naming import Naming
from lrq_jax.readers.published import NAMINGS

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "scripts" / "convert_teacher.py"
ASSETS = Path(os.environ.get("LRQ_ASSETS", REPOSITORY.parent / "shared" / "assets"))


def resnet_state(blocks=(1, 1, 1), width=16, classes=10, shortcut="shortcut", head="linear",
                 stem=3, seed=0):  # fmt: skip
    """A state dict of a basic-block ResNet, in PyTorch's names and layouts, at random."""
    rng = np.random.default_rng(seed)
    state = {}

    def draw(name, *shape):
        state[name] = rng.standard_normal(shape, np.float32)

    def conv_bn(conv, bn, outputs, inputs, size):
        draw(f"{conv}.weight", outputs, inputs, size, size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            draw(f"{bn}.{name}", outputs)
        state[f"{bn}.running_var"] **= 2
        state[f"{bn}.num_batches_tracked"] = np.array(7)

    conv_bn("conv1", "bn1", width, 3, stem)
    inputs = width
    for stage, count in enumerate(blocks):
        outputs = width * 2**stage
        for block in range(count):
            prefix = f"layer{stage + 1}.{block}."
            conv_bn(prefix + "conv1", prefix + "bn1", outputs, inputs, 3)
            conv_bn(prefix + "conv2", prefix + "bn2", outputs, outputs, 3)
            if shortcut and inputs != outputs:
                conv_bn(f"{prefix}{shortcut}.0", f"{prefix}{shortcut}.1", outputs, inputs, 1)
            inputs = outputs
    draw(f"{head}.weight", classes, inputs)
    draw(f"{head}.bias", classes)
    return state


def pytorchcv(state):
    """The same arrays under pytorchcv's names."""

    def rename(name):
        name = re.sub(r"^(conv|bn)1\.", r"features.init_block.\1.", name)
        name = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"features.stage{m[1]}.unit{int(m[2]) + 1}.", name)  # fmt: skip
        name = re.sub(r"\.(conv|bn)([12])\.", r".body.conv\2.\1.", name)
        name = re.sub(r"\.shortcut\.(\d)", lambda m: ".identity_conv." + ("conv", "bn")[int(m[1])], name)  # fmt: skip
        return name.replace("linear", "output")

    return {rename(name): array for name, array in state.items()}


def clean(state):
    return unwrap_state_dict(state)[0]


# --- unwrapping and matching ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: s, "left out 7 counters"),
        (lambda s: {"state_dict": s, "ema": {}, "epoch": 3}, "under 'state_dict' .*not used: ema"),
        (lambda s: {"model": {"net": s}, "optimizer": {"state": {}}}, "under 'net'"),
        (lambda s: {"best": s, "epoch": 3}, "under 'best'"),
        (lambda s: {"model_state": s, "loss": np.ones(3)}, "'model_state' .*not used: loss"),
        (lambda s: {f"module.model.{n}": a for n, a in s.items()}, "prefix 'module.'.*'model.'"),
        (lambda s: {**s, "extra": "text"}, "no array: extra"),
        (lambda s: {**s, "n_averaged": np.array(3)}, "left out 8 counters"),
    ],
)
def test_unwraps_and_says_so(wrap, said):
    state = resnet_state(shortcut=None)
    plain = {name: array for name, array in state.items() if "num_batches" not in name}
    unwrapped, notes = unwrap_state_dict(wrap(state))
    assert list(unwrapped) == list(plain)
    assert all((unwrapped[name] == array).all() for name, array in plain.items())
    assert re.search(said, " ".join(notes)), notes
    assert re.search(r"left out [78] counters \(num_batches", " ".join(notes))


def test_every_float_becomes_float32():
    values = np.array([1.5, -0.25, 3.140625])
    kinds = {"half": np.float16, "brain": ml_dtypes.bfloat16, "double": np.float64}
    state, notes = unwrap_state_dict({name: values.astype(kind) for name, kind in kinds.items()})
    assert all(a.dtype == np.float32 and (a == values).all() for a in state.values())
    assert re.search(
        "widened 1 arrays from float16.*bfloat16.*rounded 1 .*float64", " ".join(notes)
    )
    for tree in (3, {"state_dict": {"epoch": 3}}, {"a": {}, "b": {}}):
        with pytest.raises(ReaderError, match=r"expected a (dict of arrays|state dict)"):
            unwrap_state_dict(tree)


def test_kernels_change_layout_and_statistics_keep_their_names():
    state = clean(resnet_state())
    variables = match_variables(build_network("resnet8_cifar_b"), state)
    kernel = variables["params"]["stage2_block0_conv1"]["kernel"]
    assert kernel.shape == (3, 3, 16, 32)
    assert kernel[0, 2, 5, 7] == state["layer2.0.conv1.weight"][7, 5, 0, 2]
    assert variables["params"]["classifier"]["kernel"][3, 9] == state["linear.weight"][9, 3]
    ours = {**variables["params"]["stage3_block0_shortcut_bn"],
            **variables["batch_stats"]["stage3_block0_shortcut_bn"]}  # fmt: skip
    pairs = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    for name, theirs in pairs.items():
        np.testing.assert_array_equal(ours[name], state[f"layer3.0.shortcut.1.{theirs}"])


def test_a_dense_layer_after_flatten_reads_height_width_channels():
    net = GraphBuilder("flat", input_shape=(2, 3, 4))
    flat = net.relu(net.batch_norm(net.flatten(net.image), name="bn"))
    net.dense(net.dense(flat, 5, name="a"), 2, name="b")
    naming = Naming(name="own", rules=((r"(?P<n>.+)", "{n}"),), archs="flat")
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (5, 24), "a.bias": (5,), "b.weight": (2, 5), "b.bias": (2,)}
    names = ("weight", "bias", "running_mean", "running_var")
    shapes |= {f"bn.{name}": (24,) for name in names}
    state = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    made = match_variables(net.build(), state, namings=(naming,))
    image = rng.random((4, 2, 3), np.float32)  # C, H, W
    theirs = (image.ravel() - state["bn.running_mean"]).astype(float)
    theirs = theirs @ state["a.weight"].T @ state["b.weight"].T
    ours = (image.transpose(1, 2, 0).ravel() - made["batch_stats"]["bn"]["mean"]).astype(float)
    for name in ("a", "b"):
        ours = ours @ made["params"][name]["kernel"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)  # summed in another order
    np.testing.assert_array_equal(made["params"]["a"]["bias"], state["a.bias"])


def test_one_error_names_all_that_is_missing_left_over_and_wrong():
    state = clean(resnet_state())
    del state["layer1.0.conv1.weight"], state["bn1.running_var"]
    state |= {"head.weight": np.ones(3, np.float32), "linear.bias": np.ones(10, np.int8)}
    state["linear.weight"] = np.ones((100, 64), np.float32)
    with pytest.raises(ReaderError) as error:
        match_variables(build_network("resnet8_cifar_b"), state)
    for part in (
        "found 5 differences", "'resnet8_cifar'",
        "missing in the file: 'layer1.0.conv1.weight' (16, 16, 3, 3), for 'stage1_block0_conv1/kernel'",
        "missing in the file: 'bn1.running_var' (16,), for 'bn1/var'",
        "in the file only: 'head.weight' (3,)", "'linear.bias' is int8, expected a float",
        "'linear.weight' is (100, 64) in the file, expected (10, 64) for 'classifier/kernel'",
    ):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("conv1.weight", np.nan), ("bn1.weight", np.inf), ("bn1.running_var", -1)])  # fmt: skip
def test_broken_numbers_are_refused(name, value):
    state = clean(resnet_state())
    state[name].flat[3] = value
    with pytest.raises(ReaderError, match=f"finite weights, in '{name}'"):
        match_variables(build_network("resnet8_cifar_b"), state)


# --- detection -----------------------------------------------------------------------------------

DETECTED = [
    ({"shortcut": None}, None, "resnet8_cifar", {}),
    ({"blocks": (3, 3, 3), "shortcut": None, "classes": 100}, None, "resnet20_cifar", {}),
    ({"blocks": (18, 18, 18)}, None, "resnet110_cifar_b", {}),
    ({"blocks": (2, 2, 2), "width": 32}, None, "resnet14_cifar_b", {"width": 32}),
    ({"shortcut": "downsample", "head": "fc", "classes": 7}, None, "resnet8_cifar_b", {}),
    ({"blocks": (3, 3, 3)}, pytorchcv, "resnet20_cifar_b", {}),
    ({"blocks": (2, 2, 2, 2), "width": 64, "stem": 7, "classes": 1000, "shortcut": "downsample",
      "head": "fc"}, None, "resnet18", {}),
    ({"blocks": (3, 4, 6, 3), "width": 64, "stem": 7, "classes": 5},
     lambda s: {n.replace("init_block.", "init_block.conv."): a for n, a in pytorchcv(s).items()},
     "resnet34", {}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "rename", "arch", "settings"), DETECTED)
def test_names_and_shapes_decide_the_architecture(options, rename, arch, settings):
    state = clean((rename or (lambda s: s))(resnet_state(**options)))
    expected = {"num_classes": options.get("classes", 10), **settings}
    assert detect_arch(state) == (arch, expected)
    variables = match_variables(build_network(arch, **expected), state)
    arrays = jax.tree.leaves(variables)
    assert len(arrays) == len(state)
    # every array used once, no value changed
    assert sorted(float(a.sum(dtype=np.float64)) for a in arrays) == pytest.approx(
        sorted(float(a.sum(dtype=np.float64)) for a in state.values()))  # fmt: skip


def test_names_that_fit_two_architectures_are_an_error(monkeypatch):
    monkeypatch.setitem(FAMILIES, "twin", FAMILIES["resnet8_cifar"])
    naming = dataclasses.replace(NAMINGS[0], archs="resnet8_cifar|twin")
    with pytest.raises(ReaderError, match=r"\['twin', 'resnet8_cifar'\], .*choose with --arch"):
        detect_arch(clean(resnet_state(shortcut=None)), namings=(naming,))


def test_what_cannot_be_detected_names_what_comes_nearest():
    state = clean(resnet_state())
    state["head.bias"] = state.pop("linear.bias")
    with pytest.raises(ReaderError, match=r"'resnet8_cifar_b' comes nearest with 2 .*'head\.bias'"):
        detect_arch(state)
    with pytest.raises(ReaderError, match=r"such as \['a'\], fit none of .*pytorchcv"):
        detect_arch({"a": np.ones(3)})


# --- kept on disk --------------------------------------------------------------------------------


@pytest.fixture
def teacher():
    state = clean(resnet_state())
    state["conv1.weight"].flat[:4] = (-0.0, 1e-42, 3.4e38, 1 / 3)
    graph = build_network("resnet8_cifar_b")
    return Teacher(
        graph=graph, variables=match_variables(graph, state), arch="resnet8_cifar_b",
        preprocessing=Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), size=32, resize=36),
        class_names=tuple("abcdefghij"), source="/secret/folder/net.pt", source_sha256="0" * 64,
        notes=("one", "two"),
    )  # fmt: skip


def same(loaded, teacher):
    assert (loaded.graph, loaded.preprocessing, loaded.arch) == (
        teacher.graph, teacher.preprocessing, teacher.arch)  # fmt: skip
    assert (loaded.class_names, loaded.notes) == (teacher.class_names, teacher.notes)
    assert (loaded.source, loaded.source_sha256) == ("net.pt", "0" * 64)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32)),
                 loaded.variables, teacher.variables)  # fmt: skip
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded.variables))
    assert teacher_hash(loaded) == teacher_hash(teacher)


def test_saving_and_loading_keep_every_bit(teacher, tmp_path, capfd):
    save_teacher(teacher, tmp_path / "deep" / "t")
    same(load_teacher(tmp_path / "deep" / "t"), teacher)
    (tmp_path / "deep" / "t").rename(tmp_path / "moved")
    same(load_teacher(str(tmp_path / "moved")), teacher)
    save_embedded(teacher, tmp_path / "t.safetensors")
    same(load_teacher(tmp_path / "t.safetensors"), teacher)
    first = (tmp_path / "t.safetensors").read_bytes()
    save_embedded(teacher, tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "moved", "t.safetensors"]
    assert "secret" not in (tmp_path / "moved" / "teacher.json").read_text()
    assert capfd.readouterr() == ("", "")
    code = f"""if True:
        import sys, jax
        from lrq_jax.readers import load_teacher, teacher_hash
        assert jax.device_count() == 3
        assert not {{"torch", "tensorflow"}} & set(sys.modules)
        print(teacher_hash(load_teacher({str(tmp_path / "moved")!r})), end="")"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY),
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}  # fmt: skip
    ran = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True,
                         capture_output=True, text=True, env=environment)  # fmt: skip
    assert (ran.stdout, ran.stderr) == (teacher_hash(teacher), "")


def test_a_network_without_batch_norms_is_kept_too(tmp_path):
    net = GraphBuilder("plain", input_shape=(4, 4, 1))
    net.dense(net.flatten(net.image), 2, name="classifier")
    layers = {"classifier": {"kernel": jax.numpy.ones((16, 2)), "bias": jax.numpy.zeros(2)}}
    made = Teacher(graph=net.build(), variables={"params": layers, "batch_stats": {}}, arch="plain",
                   preprocessing=Preprocessing(mean=(0,), std=(1,), size=4))  # fmt: skip
    save_teacher(made, tmp_path / "t")
    save_embedded(made, tmp_path / "t.safetensors")
    for path in (tmp_path / "t", tmp_path / "t.safetensors"):
        loaded = load_teacher(path)
        assert loaded.variables["batch_stats"] == {}
        assert teacher_hash(loaded) == teacher_hash(made)


def test_the_hash_sees_every_array_and_the_graph(teacher):
    hashes = {teacher_hash(teacher)}
    for leaf in jax.tree.leaves(teacher.variables):
        leaf.flat[0] += 1
        hashes.add(teacher_hash(teacher))
    assert len(hashes) == 1 + len(jax.tree.leaves(teacher.variables))
    renamed = dataclasses.replace(teacher, graph=dataclasses.replace(teacher.graph, name="other"))
    assert teacher_hash(renamed) not in hashes
    assert teacher_hash(dataclasses.replace(teacher, notes=())) in hashes


def test_a_teacher_checks_itself(teacher):
    teacher.variables["params"]["bn1"]["extra"] = np.ones(3, np.float32)
    teacher.variables["params"]["conv1"]["kernel"] = np.ones((3, 3, 3, 16))
    with pytest.raises(
        ValueError, match=r"conv1/kernel: found float64 .*bn1/extra: found, expected"
    ):
        dataclasses.replace(teacher)
    del teacher.variables["params"]["bn1"]["extra"], teacher.variables["params"]["conv1"]
    with pytest.raises(ValueError, match="conv1/kernel: found nothing"):
        dataclasses.replace(teacher)


@pytest.mark.parametrize("change", [{"class_names": ("a",)}, {"preprocessing": Preprocessing(mean=(0.5,), std=(0.5,), size=32)}])  # fmt: skip
def test_a_teacher_checks_its_settings(teacher, change):
    with pytest.raises(
        ValueError, match=r"found (1 class names|preprocessing to images \(32, 32, 1\))"
    ):
        dataclasses.replace(teacher, **change)


def test_an_existing_teacher_is_overwritten_only_when_asked(teacher, tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    save_teacher(teacher, tmp_path / "t")
    other = dataclasses.replace(teacher, notes=("other",))
    with pytest.raises(FileExistsError, match="--overwrite"):
        save_teacher(other, tmp_path / "t")
    monkeypatch.setattr(store, "teacher_hash", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_teacher(other, tmp_path / "t", overwrite=True)
    monkeypatch.undo()
    same(load_teacher(tmp_path / "t"), teacher)
    save_teacher(other, tmp_path / "t", overwrite=True)
    assert load_teacher(tmp_path / "t").notes == ("other",)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="something other than a teacher"):
        save_teacher(teacher, tmp_path / "mine", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "t"]


def test_what_is_no_teacher_is_named_with_the_way_out(teacher, tmp_path, monkeypatch):
    def refused(path, message, kind=ValueError):
        with pytest.raises(kind, match=message):
            load_teacher(path)

    way_out = r"python scripts/convert_teacher\.py --source"
    refused(tmp_path / "none", f"none'.*{way_out}", FileNotFoundError)
    refused(tmp_path, f"a directory without teacher.json at .*{way_out}")
    (tmp_path / "net.pt").touch()
    refused(tmp_path / "net.pt", f"net.pt: (?s:.)*{way_out}")
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", f"w.safetensors: (?s:.)*{way_out}")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        save_embedded(teacher, tmp_path / "t.npz")

    save_teacher(teacher, tmp_path / "t")
    metadata = json.loads((tmp_path / "t" / "teacher.json").read_text())
    assert metadata["num_classes"] == 10

    def changed(message, **changes):
        text = json.dumps({k: v for k, v in (metadata | changes).items() if v != "gone"})
        (tmp_path / "t" / "teacher.json").write_text(text)
        refused(tmp_path / "t", message)

    changed(f"found format version 2, expected 1; .*{way_out}", version=2)
    changed(f"found hash .*, expected 0: damaged.*{way_out}", teacher_sha256="0")
    changed(f"damaged teacher \\(KeyError\\('arch'\\)\\); .*{way_out}", arch="gone")
    changed("arrays other than the graph's", graph=graph_to_dict(build_network("resnet8_cifar")))
    (tmp_path / "t" / "teacher.json").write_text("{")
    refused(tmp_path / "t", "damaged metadata")
    (tmp_path / "t" / "teacher.json").write_text(json.dumps(metadata))
    for part in (tmp_path / "t" / "variables" / "d").iterdir():
        part.write_bytes(part.read_bytes()[:-1])
    refused(tmp_path / "t", "damaged teacher .*missing or changed files under .*d/")
    shutil.rmtree(tmp_path / "t" / "variables")
    refused(tmp_path / "t", "damaged teacher .*missing or changed files")

    monkeypatch.setattr(store.resources, "files", lambda _: tmp_path)
    refused("digits", f"no digits_teacher.safetensors in the package.*{way_out}", FileNotFoundError)
    save_embedded(teacher, tmp_path / "assets" / "digits_teacher.safetensors")
    same(load_teacher("digits"), teacher)


# --- conversion ----------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    safetensors.numpy.save_file(resnet_state(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


RECIPES = [
    ({"shortcut": None}, None, (0.485, 0.229, 32, None)),
    ({}, None, (0.4914, 0.2470, 32, None)),
    ({"classes": 100}, None, (0.5071, 0.2673, 32, None)),
    ({}, pytorchcv, (0.4914, 0.2470, 32, None)),
    ({"classes": 100}, pytorchcv, (0.5071, 0.2675, 32, None)),
    ({"head": "fc", "shortcut": "downsample"}, None, (0.4914, 0.2023, 32, None)),
    ({**DETECTED[6][0]}, None, (0.485, 0.229, 224, 256)),
]


@pytest.mark.parametrize(("options", "rename", "expected"), RECIPES)
def test_published_preprocessing_comes_with_the_names(source, options, rename, expected):
    safetensors.numpy.save_file((rename or (lambda s: s))(resnet_state(**options)), source)
    made = convert_teacher(source)
    how = made.preprocessing
    assert (how.mean[0], how.std[0], how.size, how.resize) == expected
    assert made.graph.input_shape == (how.size, how.size, 3)
    assert made.source == "net.safetensors"
    assert made.source_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    notes = " ".join(made.notes)
    assert "normalisation: " in notes
    assert ("zero channels" in notes) == (options.get("shortcut", "") is None)
    for part in (made.arch, f"{made.graph.num_parameters():,}", made.source_sha256, *made.notes):
        assert part in describe(made)


def test_what_is_given_goes_before_what_is_published(source):
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "size": 40}
    made = convert_teacher(source, "resnet8_cifar_b", num_classes=10, **given)
    assert made.preprocessing == Preprocessing(**given)
    assert "normalisation: as given" in made.notes
    assert made.graph.input_shape == (40, 40, 3)
    safetensors.numpy.save_file(resnet_state(**DETECTED[6][0]), source)
    assert convert_teacher(source, size=112).preprocessing.resize == 128


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, {"num_classes": 100}, "found 10 classes in the file, expected the 100"),
        ({}, {"arch": "resnet20_cifar"}, "found [0-9]+ differences .*'resnet20_cifar'"),
        ({}, {"arch": "resnet9"}, "found architecture 'resnet9', expected one of"),
        ({}, {"mean": (0.5, 0.5, 0.5)}, "only one of mean and std"),
        ({}, {"mean": (125.0,) * 3, "std": (62.0,) * 3}, "divide .* by 255"),
        ({"classes": 7}, {}, "net.safetensors: found no published normalisation .*--mean R,G,B"),
    ],
)
def test_conversion_errors(source, options, given, message):
    safetensors.numpy.save_file(resnet_state(**options), source)
    with pytest.raises(ValueError, match=message):
        convert_teacher(source, **given)


def command(*arguments, cwd):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd,
                          env=environment, capture_output=True, text=True)  # fmt: skip


def test_the_command_works_from_any_folder(source, tmp_path):
    ran = command("--source", source.name, "--out", "made/t", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "resnet8_cifar_b" in ran.stdout
    assert load_teacher(tmp_path / "made" / "t").arch == "resnet8_cifar_b"
    again = command("--source", source.name, "--out", "made/t", cwd=tmp_path)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize("arch", [[], ["--arch", "resnet110_cifar"]])
def test_the_command_leaves_nothing_behind_when_it_fails(
    source, tmp_path, capsys, monkeypatch, arch
):
    spec = importlib.util.spec_from_file_location("convert_teacher", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not arch:
        source.write_bytes(source.read_bytes()[:1000])
    before = sorted(tmp_path.iterdir())
    command = ["--source", str(source), "--out", str(tmp_path / "t"), *arch]
    assert module.main(command) == 2
    assert sorted(tmp_path.iterdir()) == before
    whole = capsys.readouterr().err
    assert "net.safetensors: found" in whole
    assert "more lines" not in whole
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert module.main(command) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) <= 26
    assert ("more lines" in message) == bool(arch)
    assert (len(whole.splitlines()) > 26) == bool(arch)


# --- published files -----------------------------------------------------------------------------

PUBLISHED = [
    ("cifar10/resnet20_akamaster.pt", "resnet20_cifar", 269_722, (0.485, 0.456, 0.406)),
    ("cifar10/resnet32_akamaster.pt", "resnet32_cifar", 464_154, (0.485, 0.456, 0.406)),
    ("cifar10/resnet20_forge.pt", "resnet20_cifar_b", 272_474, (0.4914, 0.4822, 0.4465)),
    ("cifar100/resnet20_forge.pt", "resnet20_cifar_b", 278_324, (0.5071, 0.4865, 0.4409)),
]


@pytest.mark.parametrize(("file", "arch", "parameters", "mean"), PUBLISHED)
def test_published_files_convert_as_they_are(tmp_path, file, arch, parameters, mean):
    if not (ASSETS / file).is_file():
        pytest.skip(f"{file} is not under {ASSETS}: set LRQ_ASSETS to the folder of test assets")
    made = convert_teacher(ASSETS / file)
    assert (made.arch, made.graph.num_parameters(), made.preprocessing.mean) == (
        arch, parameters, mean)  # fmt: skip
    save_teacher(made, tmp_path / "t")
    assert teacher_hash(load_teacher(tmp_path / "t")) == teacher_hash(made)


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"bn_eps": float("nan")}, "bn_eps nan"), ({"bn_eps": -1.0}, "bn_eps -1.0"),
     ({"size": 0}, "size 0"), ({"size": -3}, "size -3"), ({"resize": 0}, "resize 0")],
)  # fmt: skip
def test_choices_that_no_image_or_norm_can_have_are_refused(choice, message, tmp_path):
    with pytest.raises(ReaderError, match=f"found {message}, expected"):
        convert_teacher(tmp_path / "unread.pt", **choice)


@pytest.mark.parametrize("arch", ["mobilenet_v2_cifar", "mobilenet_v1", "efficientnet_lite0"])
def test_a_file_of_another_family_than_the_one_named_is_told_by_its_arrays(arch, tmp_path):
    np.savez(tmp_path / "a.npz", **{"conv1.weight": np.zeros((16, 3, 3, 3), np.float32)})
    with pytest.raises(ReaderError, match=r"in the file only: 'conv1\.weight'"):
        convert_teacher(tmp_path / "a.npz", arch=arch)

"""Keras' files that are damaged, or made to reach outside of themselves."""

import io
import zipfile

import h5py
import numpy as np
import pytest
from keras_files import Node, chain, image, write, write_listed

from lrq_jax.readers import ReaderError, convert_teacher
from lrq_jax.readers import hdf5_file as hdf5

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}
LAYOUTS = ("2.15.0 h5", "3.15.1 h5", "3.15.1 keras")


def nodes():
    settings = {"filters": 4, "kernel_size": [1, 1], "use_bias": False, "activation": "relu"}
    weights = {"kernel": np.ones((1, 1, 3, 4), np.float32)}
    head = Node("Dense", "d", {"units": 2, "use_bias": False}, weights={"kernel": np.ones((4, 2), np.float32)})  # fmt: skip
    return chain(image(4, 4, 3), Node("Conv2D", "c", settings, weights=weights),
                 Node("GlobalAveragePooling2D", "gap"), head)  # fmt: skip


KERNEL = {"h5": "model_weights/c/c/kernel", "keras": "layers/conv2d/vars/0"}


def change(path, act):
    """Runs `act(file, path of the kernel)` on the HDF5 file in one of ours, and writes it back."""
    if path.suffix == ".h5":
        with h5py.File(path, "a") as file:
            act(file, KERNEL["h5"])
        return path
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO(members["model.weights.h5"])
    with h5py.File(buffer, "a") as file:
        act(file, KERNEL["keras"])
    members["model.weights.h5"] = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def replace(make):
    def act(file, kernel):
        del file[kernel]
        make(file, kernel)

    return act


@pytest.mark.parametrize("form", ["h5", "keras"])
@pytest.mark.parametrize("kind", ["external", "soft", "storage", "virtual", "bomb", "string"])
def test_nothing_outside_the_file_is_opened(tmp_path, form, kind):
    outside = tmp_path / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["w"] = np.ones((1, 1, 3, 4), np.float32)
    raw = tmp_path / "raw.bin"
    raw.write_bytes(bytes(48))
    shape = (1, 1, 3, 4)

    def virtual(file, at):
        layout = h5py.VirtualLayout(shape, np.float32)
        layout[...] = h5py.VirtualSource(str(outside), "w", shape)
        file.create_virtual_dataset(at, layout)

    make, message = {
        "external": (lambda f, at: f.__setitem__(at, h5py.ExternalLink(str(outside), "w")),
                     r"ExternalLink '.*' to '.*outside\.h5'.*in the file itself"),
        "soft": (lambda f, at: f.__setitem__(at, h5py.SoftLink("/elsewhere")), "SoftLink"),
        "storage": (lambda f, at: f.create_dataset(at, shape, "f4", external=[(str(raw), 0, 48)]),
                    "data kept in another file"),
        "virtual": (virtual, "a virtual dataset"),
        "bomb": (lambda f, at: f.create_dataset(at, (1 << 20, 1 << 20), "f4", chunks=(64, 64)),
                 "more data than the file can hold at array"),
        "string": (lambda f, at: f.create_dataset(at, data="code"), "object at .*expected numbers"),
    }[kind]  # fmt: skip
    path = change(write(tmp_path, nodes(), f"3.15.1 {form}"), replace(make))
    outside.unlink()  # opening it would fail in another way
    raw.unlink()
    with pytest.raises(ReaderError, match=rf"^model\.{form}: found {message}"):
        convert_teacher(path, **PLAIN)


def test_other_ways_to_hold_too_much(tmp_path):
    def loop(file, kernel):
        file["model_weights/again"] = file["model_weights"]

    path = change(write(tmp_path, nodes(), LAYOUTS[0]), loop)
    with pytest.raises(ReaderError, match="linked twice"):
        convert_teacher(path, **PLAIN)

    def packed(file, kernel):
        del file[kernel]
        file.create_dataset(kernel, data=np.zeros(10**7, np.float32), compression="gzip")

    path.unlink()
    path = change(write(tmp_path, nodes(), LAYOUTS[1]), packed)
    with pytest.raises(ReaderError, match="more data than the file can hold"):
        convert_teacher(path, **PLAIN)
    path.unlink()
    path = write(tmp_path, nodes(), "3.15.1 keras")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("assets/zeros", bytes(10**7))
    with pytest.raises(ReaderError, match=r"^model\.keras: found an archive of .* unpacks to 100"):
        convert_teacher(path, **PLAIN)


def test_filters_other_than_hdf5s_own_are_refused(tmp_path):
    def lzf(file, kernel):
        del file[kernel]
        data = np.ones((1, 1, 3, 4), np.float32)
        file.create_dataset(kernel, data=data, compression="lzf")

    def gzip(file, kernel):
        del file[kernel]
        data = np.ones((1, 1, 3, 4), np.float32)
        file.create_dataset(kernel, data=data, compression="gzip", shuffle=True, fletcher32=True)

    path = change(write(tmp_path, nodes(), LAYOUTS[1]), lzf)
    with pytest.raises(ReaderError, match=r"HDF5 filters \[32000\]"):
        convert_teacher(path, **PLAIN)
    assert convert_teacher(change(path, gzip), **PLAIN).graph.num_classes == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_anywhere_is_an_error(tmp_path, layout):
    path = write(tmp_path, nodes(), layout)
    data = path.read_bytes()
    for length in [*range(0, len(data), 211), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ReaderError, match=r"^model\.(h5|keras): found"):
            convert_teacher(path, **PLAIN)


def test_bytes_changed_anywhere_in_an_archive_are_read_or_refused_cleanly(tmp_path, rng):
    path = write(tmp_path, nodes(), "3.15.1 keras")
    data, refused = path.read_bytes(), 0
    for _ in range(60):
        changed = np.frombuffer(data, np.uint8).copy()
        changed[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
        path.write_bytes(changed.tobytes())
        try:
            convert_teacher(path, **PLAIN)
        except ReaderError:
            refused += 1
    assert refused > 0


def test_archives_without_their_members_and_foreign_files(tmp_path):
    path = tmp_path / "model.keras"

    def refused(message):
        with pytest.raises(ReaderError, match=message):
            convert_teacher(path, **PLAIN)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    refused("expected config.json, metadata.json and model.weights.h5")
    whole = write(tmp_path, nodes(), "3.15.1 keras").read_bytes()
    for name, data, message in (
        ("config.json", b"{", "damaged JSON in config.json"),
        ("config.json", b"[" * 100_000, "damaged JSON"),
        ("config.json", b"[]", "a list in config.json"),
        ("config.json", b"{}", "Keras does not write"),
        ("model.weights.h5", b"hello", "damaged HDF5"),
    ):
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w") as new:
            for member in old.namelist():
                new.writestr(member, data if member == name else old.read(member))
        refused(message)
    path = tmp_path / "model.h5"
    for data in (b"", b"hello", bytes(1000)):
        path.write_bytes(data)
        refused("damaged HDF5")
    with h5py.File(path, "w") as file:
        file["x/y"] = np.zeros(3)
    refused(r"HDF5 file of \['', 'x'\], expected one written by Keras")
    with pytest.raises(FileNotFoundError, match=r"none\.h5"):
        convert_teacher(tmp_path / "none.h5")


def test_long_lists_of_names_are_kept_in_pieces(tmp_path):
    model = nodes()
    path = write(tmp_path, model, LAYOUTS[0])
    with h5py.File(path, "a") as file:
        del file["model_weights"]
        write_listed(file.create_group("model_weights"), model, "2.15.0", chunks=3)
    assert convert_teacher(path, **PLAIN).graph.num_classes == 2
    assert hdf5.read_hdf5(path).names("model_weights", "layer_names") == [
        "input_1",
        "c",
        "gap",
        "d",
    ]

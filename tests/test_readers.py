"""Checkpoint readers: bytes assembled here by hand (torch is never needed)."""

import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lrq_jax.readers import (
    ReaderError,
    read_safetensors_file,
    read_torch_file,
    torch_file,
    zip_limits,
)
from lrq_jax.readers.npz_file import read_npz_file

# --- a pickle assembler: what torch.save writes, without torch -----------------------------------


class Raw:
    """Opcodes put into a pickle as they are."""

    def __init__(self, *parts):
        self.code = b"".join(part if isinstance(part, bytes) else emit(part) for part in parts)


def named(module, name):
    return Raw(b"c", f"{module}\n{name}\n".encode())


def call(function, *arguments):
    return Raw(function, tuple(arguments), b"R")


def emit(value):
    """Protocol 2 opcodes of a value."""
    if isinstance(value, Raw):
        return value.code
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        data = value.to_bytes(11, "little", signed=True)
        return b"\x8a\x0b" + data
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(emit, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(emit, value)) + b"e"
    items = b"".join(emit(key) + emit(item) for key, item in value.items())
    return b"}(" + items + b"u"


def dump(tree):
    return b"\x80\x02" + emit(tree) + b"."


def storage(key, kind, numel, *view):
    return Raw(("storage", named("torch", kind), key, "cpu", numel, *view), b"Q")


def tensor(stored, size, stride, offset=0):
    hooks = call(named("collections", "OrderedDict"))
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, stored, offset, size, stride, False, hooks)


def of_array(key, array, kind="FloatStorage"):
    steps = tuple(step // array.itemsize for step in array.strides)
    return tensor(storage(key, kind, array.size), array.shape, steps)


def write_zip(path, tree, blobs, order="little", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", tree if isinstance(tree, bytes) else dump(tree))
        archive.writestr("archive/byteorder", order)
        for key, blob in blobs.items():
            archive.writestr(f"archive/data/{key}", blob)
    return path


def write_legacy(path, tree, blobs, item=4):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    head = [dump(0x1950A86A20F9469CFC6C), dump(1001), dump(system)]
    body = [tree if isinstance(tree, bytes) else dump(tree), dump(list(blobs))]
    tail = [struct.pack("<q", len(blob) // item) + blob for blob in blobs.values()]
    path.write_bytes(b"".join(head + body + tail))
    return path


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])
VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7

# --- tensors -------------------------------------------------------------------------------------


@WRITERS
def test_reads_tensors_and_plain_values_of_both_formats(tmp_path, write):
    tree = {"w": of_array("0", VALUES), "epoch": 3, "list": [1, (True, None, "x")]}
    read = read_torch_file(write(tmp_path / "a.pt", tree, {"0": VALUES.tobytes()}))
    np.testing.assert_array_equal(read["w"], VALUES)
    assert read["w"].flags.writeable
    assert read["w"].flags.c_contiguous
    assert (read["epoch"], read["list"]) == (3, [1, (True, None, "x")])


KINDS = {"Float": "float32", "Double": "float64", "Half": "float16", "Char": "int8",
         "Short": "int16", "Int": "int32", "Long": "int64", "Byte": "uint8", "Bool": "bool"}  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), KINDS.items())
@pytest.mark.parametrize("order", ["little", "big"])
def test_reads_every_dtype_in_both_byte_orders(tmp_path, kind, dtype, order):
    values = np.array([0, 1, 2, 100, -3 if dtype[0] in "fi" else 5]).astype(dtype)
    blob = values.astype(values.dtype.newbyteorder("<" if order == "little" else ">")).tobytes()
    path = write_zip(
        tmp_path / "a.pt", {"w": of_array("0", values, kind + "Storage")}, {"0": blob}, order
    )
    read = read_torch_file(path)["w"]
    assert read.dtype == dtype
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, values)


@WRITERS
def test_bfloat16_is_widened_bit_for_bit(tmp_path, write):
    bits = np.array([0x3F80, 0xC049, 0x0001, 0x8000, 0x7F80, 0x7FC1, 0x4049], np.uint16)
    tree = {"w": of_array("0", bits, "BFloat16Storage")}
    options = {"item": 2} if write is write_legacy else {}
    read = read_torch_file(write(tmp_path / "a.pt", tree, {"0": bits.tobytes()}, **options))["w"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read.view(np.uint32), bits.astype(np.uint32) << 16)
    assert read[0] == 1
    assert read[1] == -3.140625


@WRITERS
def test_strided_views_of_one_storage(tmp_path, write):
    stored = storage("0", "FloatStorage", 24)
    tree = {
        "transposed": tensor(stored, (4, 3), (1, 4), 12),
        "every_other": tensor(stored, (3,), (8,), 5),
        "expanded": tensor(stored, (2, 5), (1, 0), 22),
        "scalar": tensor(stored, (), (), 23),
        "empty": tensor(stored, (0, 4), (4, 1), 24),
    }
    read = read_torch_file(write(tmp_path / "a.pt", tree, {"0": VALUES.tobytes()}))
    flat = VALUES.ravel()
    np.testing.assert_array_equal(read["transposed"], VALUES[1].T)
    np.testing.assert_array_equal(read["every_other"], flat[5::8])
    np.testing.assert_array_equal(read["expanded"], np.repeat(flat[22:24, None], 5, 1))
    assert read["scalar"] == flat[23]
    assert read["empty"].shape == (0, 4)


def test_a_legacy_storage_may_be_a_view_of_another(tmp_path):
    view = storage("0", "FloatStorage", 24, ("7", 12, 6))
    write_legacy(tmp_path / "a.th", {"w": tensor(view, (2, 2), (3, 1), 1)}, {"0": VALUES.tobytes()})
    read = read_torch_file(tmp_path / "a.th")
    np.testing.assert_array_equal(read["w"], VALUES.ravel()[12:18].reshape(2, 3)[:, 1:])
    beyond = storage("0", "FloatStorage", 24, ("7", 20, 6))
    write_legacy(tmp_path / "b.th", {"w": tensor(beyond, (1,), (1,))}, {"0": VALUES.tobytes()})
    with pytest.raises(ReaderError, match="outside storage '0'"):
        read_torch_file(tmp_path / "b.th")


def test_tensors_of_an_untyped_storage_and_parameters(tmp_path):
    untyped = Raw(("storage", named("torch.storage", "UntypedStorage"), "0", "cpu", 96), b"Q")
    v3 = named("torch._utils", "_rebuild_tensor_v3")
    made, beyond = (
        call(v3, untyped, 4, (n,), (2,), False, None, named("torch", "float32")) for n in (5, 11)
    )
    parameter = call(named("torch._utils", "_rebuild_parameter"), made, True, None)
    path = write_zip(tmp_path / "a.pt", {"w": parameter}, {"0": VALUES.tobytes()})
    np.testing.assert_array_equal(read_torch_file(path)["w"], VALUES.ravel()[4:14:2])
    with pytest.raises(ReaderError, match=r"reaches element 25 .* holds 24"):
        read_torch_file(write_zip(path, {"w": beyond}, {"0": VALUES.tobytes()}))


def test_attributes_and_company_of_a_state_dict_are_passed_over(tmp_path):
    ordered = Raw(call(named("collections", "OrderedDict")), {"_metadata": {"": 1}}, b"b")
    ordered = Raw(ordered, b"(", "w", of_array("0", VALUES), b"u")
    arguments = Raw(named("argparse", "Namespace"), (), b"\x81", {"lr": 1}, b"b")
    tree = {"state_dict": ordered, "args": arguments, "on": call(named("torch", "device"), "cuda")}
    read = read_torch_file(write_zip(tmp_path / "a.pt", tree, {"0": VALUES.tobytes()}))
    assert list(read["state_dict"]) == ["w"]
    assert [repr(read[key]) for key in ("args", "on")] == ["Opaque()"] * 2


def test_torch_writes_what_we_read(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: by choice, never needed")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).half()
    x = torch.randn(4, 5, 6)
    kinds = ["float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool"]
    tree = {"net": net.state_dict(), "views": [x.T if x.ndim < 3 else x.permute(2, 0, 1), x[1:, ::2]],
            "parameter": torch.nn.Parameter(x), "b": x.bfloat16(), "size": x.shape,
            "kinds": {kind: (x * 3).to(getattr(torch, kind)) for kind in kinds}}  # fmt: skip
    for zipped in (True, False):
        torch.save(tree, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
        read = read_torch_file(tmp_path / "t.pt")
        for name, value in net.state_dict().items():
            np.testing.assert_array_equal(read["net"][name], value.numpy())
        for ours, theirs in zip(read["views"], tree["views"], strict=True):
            np.testing.assert_array_equal(ours, theirs.numpy())
        for kind, value in tree["kinds"].items():
            assert read["kinds"][kind].dtype == kind
            np.testing.assert_array_equal(read["kinds"][kind], value.numpy())
        np.testing.assert_array_equal(read["parameter"], x.numpy())
        np.testing.assert_array_equal(read["b"], tree["b"].float().numpy())
        assert read["size"] == (4, 5, 6)
    torch.save(net, tmp_path / "whole.pt")
    with pytest.raises(ReaderError, match=r"torch\.nn\.modules\.container\.Sequential"):
        read_torch_file(tmp_path / "whole.pt")


# --- refused -------------------------------------------------------------------------------------


class Evil:
    """Pickles into a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@WRITERS
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, write, protocol):
    bait, code = tmp_path / "made", pickle.dumps({"w": Evil(tmp_path / "made")}, protocol)
    pickle.loads(code)  # the bait works
    bait.rmdir()
    with pytest.raises(ReaderError, match=r"(posix|nt)\.mkdir'.*never does.*state_dict\(\)"):
        read_torch_file(write(tmp_path / "a.pt", code, {}))
    assert not bait.exists()


@WRITERS
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (call(named("models.resnet", "ResNet20")), "a.pt: found a pickled 'models.resnet.ResNet20'"),
        (Raw(b"\x80\x04", "os", "system", b"\x93", ("true",), b"R"), "os.system"),
        (call(Raw(b"\x80\x04", "collections", "OrderedDict.fromkeys", b"\x93")), "fromkeys"),
        (Raw(("module", "x", "y", "z", 1), b"Q"), "whole pickled module"),
        (tensor(storage("0", "FloatStorage", 24), (25,), (1,)), "reaches element 25 .* holds 24"),
        (tensor(storage("0", "FloatStorage", 24), (3, 5), (5, 3), 3), "reaches element 26"),
        (tensor(storage("0", "FloatStorage", 24), (2,), (-1,), 1), "from zero up"),
        (tensor(storage("0", "FloatStorage", 24), (2,), (1,), -1), "from zero up"),
        (tensor(storage("0", "FloatStorage", 24), (2, 2), (1,)), "one length"),
        (tensor(storage("0", "FloatStorage", 24), (1 << 40,), (0,)), "bytes together"),
        (storage("0", "ComplexFloatStorage", 24), "torch.ComplexFloatStorage"),
        # BUILD writes into a record after its bounds were checked, or into our own tables
        (Raw(of_array("0", VALUES), {"size": (10**6,)}, b"b"), "changes a TensorRecord"),
        (Raw(storage("0", "FloatStorage", 24), {"numel": 10**6}, b"b"), "changes a Storage"),
        (Raw(named("torch", "FloatStorage"), {"dtype": "O"}, b"b"), "changes a StorageType"),
        (Raw(named("torch._utils", "_rebuild_tensor"), {"x": 1}, b"b"), "changes a _Function"),
        (Raw(b"}r\xff\xff\xff\x7f"), "memo slot 2147483647"),
        (Raw(b"]q\x00", b"h\x00a"), "nested without end"),
    ],
)  # fmt: skip
def test_anything_but_plain_tensors_is_refused_by_name(tmp_path, write, value, message):
    tree = {"v": of_array("0", VALUES), "w": value}
    path = write(tmp_path / "a.pt", tree, {"0": VALUES.tobytes()})
    with pytest.raises(ReaderError, match=message):
        read_torch_file(path)


def test_a_small_file_does_not_expand_to_gigabytes(tmp_path):
    wide = tensor(storage("0", "FloatStorage", 24), (1 << 24,), (0,))
    path = write_zip(tmp_path / "a.pt", {"w": wide}, {"0": VALUES.tobytes()})
    with pytest.raises(ReaderError, match="expected what the file can hold"):
        read_torch_file(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_compressions_that_zipfile_does_not_bound_are_refused(suffix, compression, tmp_path):
    path = tmp_path / f"a{suffix}"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("data.pkl", bytes(100))
    read = read_torch_file if suffix == ".pt" else read_npz_file
    with pytest.raises(ReaderError, match=r"'data\.pkl' of compression \d+, expected stored"):
        read(path)


def test_shared_nodes_are_visited_once(tmp_path):
    code = b"]q\x00" + b"".join(b"](" + b"h%c" % n * 10 + b"eq%c" % (n + 1) for n in range(60))
    write_zip(tmp_path / "a.pt", b"\x80\x02" + code + b".", {})
    assert len(read_torch_file(tmp_path / "a.pt")) == 10  # 10**60 when each is copied


@WRITERS
def test_a_file_cut_anywhere_is_an_error(tmp_path, write):
    whole = write(tmp_path / "a.pt", {"w": of_array("0", VALUES)}, {"0": VALUES.tobytes()})
    data, cut = whole.read_bytes(), tmp_path / "cut.pt"
    for length in [*range(0, len(data), 13), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ReaderError, match=r"^cut\.pt: found"):
            read_torch_file(cut)


def test_damaged_and_foreign_files_are_errors(tmp_path, monkeypatch):
    blob, tree = VALUES.tobytes(), {"w": of_array("0", VALUES)}

    def refused(path, message):
        with pytest.raises(ReaderError, match=message):
            read_torch_file(path)

    path = write_zip(tmp_path / "a.pt", tree, {"0": blob})
    path.write_bytes(path.read_bytes().replace(blob, b"x" + blob[1:]))
    refused(path, "damaged member 'data/0'.*CRC")
    refused(write_zip(path, tree, {"0": blob[:-4]}), "92 bytes in storage '0', expected 96")
    refused(write_zip(path, tree, {"1": blob}), "no member 'data/0'")
    refused(write_zip(path, tree, {"0": blob}, order="middle"), "byte order b'middle'")
    for blobs in ({"0": blob, "1": blob}, {"1": blob}):
        refused(write_legacy(path, tree, blobs), "storages listed than used")
    vast = {"w": tensor(storage("0", "FloatStorage", 1 << 44), (2,), (1,))}
    refused(write_legacy(path, vast, {"0": blob}), "truncated file: storage '0' of 70368744177664")
    refused(write_legacy(path, tree, {"0": blob}, item=8), "found 12 elements .* expected 24")
    zeros = {"0": bytes(10**7)}
    bomb = write_zip(path, tree, zeros, compression=zipfile.ZIP_DEFLATED)
    refused(bomb, "that unpacks to 100.....")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", dump(tree))
        archive.writestr("a/constants.pkl", b"")
    refused(path, "TorchScript archive")
    for content in (b"", b"hello world\n", bytes(100), pickle.dumps({"w": 1})):
        path.write_bytes(content)
        refused(path, r"a\.pt: found")
    monkeypatch.setattr(zip_limits, "MAX_BYTES", 10_000)
    refused(write_zip(path, tree, {"0": bytes(9_900)}, "little", 8), "at most 10000 and")
    monkeypatch.setattr(torch_file, "MAX_BYTES", 300)
    refused(write_zip(path, tree, {"0": blob}), "over 300 bytes, expected less")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        read_torch_file(tmp_path / "none.pt")


def test_safetensors(tmp_path):
    half = VALUES.astype(np.float16)
    brain = VALUES.astype(ml_dtypes.bfloat16)
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": VALUES, "h": half, "n": np.arange(3)}, path, {"key": "value"})
    arrays, metadata = read_safetensors_file(path)
    assert metadata == {"key": "value"}
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "w": "float32", "h": "float32", "n": "int64"}  # fmt: skip
    np.testing.assert_array_equal(arrays["w"], VALUES)
    np.testing.assert_array_equal(arrays["h"], half.astype(np.float32))

    def one(kind, data):
        header = b'{"w":{"dtype":"%s","shape":[2,3,4],"data_offsets":[0,%d]}}' % (kind, len(data))
        path.write_bytes(struct.pack("<Q", len(header)) + header + data)
        return read_safetensors_file(path)[0]["w"]

    read = one(b"BF16", brain.tobytes())
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, brain.astype(np.float32))
    with pytest.raises(ReaderError, match="'w' of dtype F8_E4M3"):
        one(b"F8_E4M3", bytes(24))
    with pytest.raises(ReaderError, match="damaged"):
        one(b"F32", bytes(20))


def test_a_safetensors_file_cut_anywhere_is_an_error(tmp_path):
    path, cut = tmp_path / "a.safetensors", tmp_path / "cut.safetensors"
    safetensors.numpy.save_file({"w": VALUES, "n": np.arange(3)}, path)
    data = path.read_bytes()
    for length in [*range(0, len(data), 11), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ReaderError, match=r"^cut\.safetensors: found"):
            read_safetensors_file(cut)
    # A header that claims more than there is, in the largest number its eight bytes hold.
    for claimed in (2**32, 2**63, 2**64 - 1):
        cut.write_bytes(struct.pack("<Q", claimed) + data[8:])
        with pytest.raises(ReaderError, match=r"^cut\.safetensors: found"):
            read_safetensors_file(cut)

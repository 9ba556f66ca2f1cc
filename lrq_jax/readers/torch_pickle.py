"""The restricted unpickler behind `torch_file`: builds dicts, lists and tensor records, runs nothing.

A pickle is a program that may call any importable function. Here `find_class` hands out only the
stand-ins of this file: a tensor becomes a record of (storage, offset, size, stride, dtype), an
optimizer's settings an inert `Opaque`; every other name ends the reading with its name.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from lrq_jax.readers.errors import ReaderError

MAX_BYTES = 8 << 30
"""Bytes a file may hold or its tensors take up together (8 GiB)."""

BFLOAT16 = "bfloat16"
"""Marks storages whose 16 bits are the upper half of a float32."""

STORAGES: dict[str, str] = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": BFLOAT16,
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
"""PyTorch's storage class -> dtype of its elements."""

_DTYPES = {
    **{name: name for name in STORAGES.values()},
    **{"float": "float32", "double": "float64", "half": "float16", "long": "int64"},
    **{"uint16": "uint16", "uint32": "uint32", "uint64": "uint64", "int": "int32"},
}


def item_size(dtype: str) -> int:
    """Bytes of one element as stored."""
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


class _Sealed:
    """Refuses a pickle's BUILD, which would write attributes past a frozen dataclass: a record
    changed after its bounds were checked could reach outside its storage."""

    def __setstate__(self, state: Any) -> NoReturn:
        raise ReaderError(f"found a pickle that changes a {type(self).__name__}, refused")


class Opaque:
    """Stands for a value that is no tensor (arguments, devices); nothing of it is built or run."""

    def __new__(cls, *_: Any, **__: Any) -> Opaque:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Ignores what the pickle would put into it."""

    def __repr__(self) -> str:
        return "Opaque()"


class _Dict(dict):
    """An OrderedDict that ignores attributes (`_metadata`) instead of setting them."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class StorageType(_Sealed):
    """Stand-in for a PyTorch storage class or dtype."""

    dtype: str


@dataclasses.dataclass(frozen=True)
class Storage(_Sealed):
    """A typed window on the bytes of one stored record: `numel` elements from `start`."""

    key: str
    dtype: str
    numel: int
    start: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class TensorRecord(_Sealed):
    """A strided view of a storage, in elements, checked to lie inside it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes up once it is contiguous and bfloat16 is widened."""
        return math.prod(self.size) * max(item_size(self.dtype), 4)


@dataclasses.dataclass(frozen=True)
class _Function(_Sealed):
    """A function of this file as a pickle may call it; its own attributes are out of reach."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or any(type(v) is not int or v < 0 for v in values):
        raise ReaderError(f"found tensor geometry {values!r}, expected integers from zero up")
    return tuple(values)


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None = None) -> TensorRecord:  # fmt: skip
    """The record of a view; refuses one that reaches outside its storage."""
    if not isinstance(storage, Storage):
        raise ReaderError(f"found a tensor over {type(storage).__name__}, expected a storage")
    (offset,) = _integers((offset,))
    size, stride = _integers(size), _integers(stride)
    if len(size) != len(stride):
        raise ReaderError(f"found a tensor of size {size} and stride {stride}, expected one length")
    stored = dtype or storage.dtype
    available = storage.numel * item_size(storage.dtype) // item_size(stored)
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if math.prod(size) and reach > available:
        raise ReaderError(
            f"found a tensor of size {size}, stride {stride} and offset {offset} that reaches "
            f"element {reach} of storage {storage.key!r}, which holds {available}"
        )
    return TensorRecord(storage, offset, size, stride, stored)


def _rebuild_v2(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRecord:
    return _rebuild(storage, offset, size, stride)


def _rebuild_v3(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any,
                dtype: Any, *_: Any) -> TensorRecord:  # fmt: skip
    if not isinstance(dtype, StorageType):
        raise ReaderError(f"found a tensor of dtype {dtype!r}, expected one of {sorted(_DTYPES)}")
    return _rebuild(storage, offset, size, stride, dtype.dtype)


def _data(data: Any = None, *_: Any) -> Any:
    return data


def _from_type(function: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    if function not in (_Function(_rebuild_v2), _Function(_rebuild_v3)):
        raise ReaderError("found a tensor subclass built in its own way, expected plain tensors")
    return function(*arguments)


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


_STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    **{
        (module, name): _Function(function)
        for module, name, function in (
            ("torch._utils", "_rebuild_tensor", _rebuild_v2),
            ("torch._utils", "_rebuild_tensor_v2", _rebuild_v2),
            ("torch._utils", "_rebuild_tensor_v3", _rebuild_v3),
            ("torch._utils", "_rebuild_parameter", _data),
            ("torch._utils", "_rebuild_parameter_with_state", _data),
            ("torch._tensor", "_rebuild_from_type_v2", _from_type),
            ("torch.nn.parameter", "Parameter", _data),
            ("torch.nn", "Parameter", _data),
            ("torch", "Size", _size),
            ("builtins", "set", set),
            ("__builtin__", "set", set),
        )
    },
    **{
        (module, name): StorageType(dtype)
        for name, dtype in STORAGES.items()
        for module in ("torch", "torch.cuda", "torch.storage")
    },
    **{("torch", name): StorageType(dtype) for name, dtype in _DTYPES.items()},
    **dict.fromkeys(
        [
            ("torch", "device"),
            ("torch", "Tensor"),
            ("argparse", "Namespace"),
            ("collections", "Counter"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib._local", "PosixPath"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "scalar"),
            ("_codecs", "encode"),
        ],
        Opaque,
    ),
}
"""All that a pickle may name; `Opaque` for the usual company of a state dict."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, load_storage: Callable[[tuple], Storage]) -> None:
        super().__init__(stream, encoding="latin1")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            _refuse(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        if isinstance(pid, tuple) and pid and pid[0] == "module":
            _refuse("torch.nn.Module")
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise ReaderError(f"found a persistent id {pid!r}, expected one of a storage")
        return self._load_storage(pid)


def _refuse(name: str) -> NoReturn:
    raise ReaderError(
        f"found a pickled {name!r}, expected only tensors in dicts and lists: building it would "
        "run the file's own code, which this reader never does (a whole pickled module looks like "
        "this). Where you trust the file, load it in PyTorch and write its weights: "
        "torch.save(model.state_dict(), 'weights.pt')"
    )


def storage_of(pid: tuple) -> Storage:
    """The storage a persistent id `("storage", type, key, location, numel, ...)` stands for."""
    _, kind, key, _, numel = pid[:5]
    if not isinstance(kind, StorageType) or not isinstance(key, str):
        raise ReaderError(f"found storage {key!r} of type {kind!r}, expected one of {[*STORAGES]}")
    return Storage(key, kind.dtype, *_integers((numel,)))


def unpickle(data: bytes, load_storage: Callable[[tuple], Storage] = storage_of) -> Any:
    """The object tree of one pickle, with `TensorRecord`s for tensors; runs nothing of it.

    Args:
      data: bytes of one pickle, nothing after it.
      load_storage: makes a `Storage` of a persistent id.

    Raises:
      ReaderError: a damaged pickle, or any class or function that is not a plain tensor's.
    """
    try:
        operations = 0
        for operations, (opcode, argument, _) in enumerate(pickletools.genops(data), start=1):
            # A memo slot far above the number of operations makes the C unpickler allocate it.
            puts = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
            if puts and argument is not None and argument > operations:
                raise ReaderError(
                    f"found a pickle with memo slot {argument}, expected {operations}"
                )
        return _Unpickler(io.BytesIO(data), load_storage).load()
    except ReaderError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ReaderError(f"found a damaged pickle ({error!r}), expected a complete one") from error


def resolve(tree: Any, array: Callable[[TensorRecord], np.ndarray], *, limit: int = MAX_BYTES) -> Any:  # fmt: skip
    """The tree with every tensor record replaced by its array; each shared node is visited once.

    Raises:
      ReaderError: tensors that would take up more than `limit` bytes, or a tree within itself.
    """
    done: dict[int, Any] = {}
    total = 0

    def visit(node: Any) -> Any:
        nonlocal total
        if id(node) in done:
            return done[id(node)]
        if isinstance(node, TensorRecord):
            total += node.nbytes
            if total > limit:
                raise ReaderError(
                    f"found tensors of over {limit} bytes together, expected what the file can hold"
                )
            made: Any = array(node)
        elif isinstance(node, dict):
            made = {key: visit(value) for key, value in node.items()}
        elif isinstance(node, list | tuple):
            made = type(node)(visit(value) for value in node)
        else:
            return node
        done[id(node)] = made
        return made

    try:
        return visit(tree)
    except RecursionError as error:
        raise ReaderError("found a tree nested without end, expected a dict of tensors") from error

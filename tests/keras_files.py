"""Writes Keras' files by hand, as Keras 2.15 and 3.15 write them, without Keras.

A model is a list of `Node`s. `write` puts it into one of `LAYOUTS`; what differs between them
(names, order, way of writing calls) was taken from files that those versions made.
"""

import dataclasses
import io
import itertools
import json
import re
import zipfile

import h5py
import numpy as np

_LAST = {"data_format": "channels_last"}
_CONV = {"strides": [1, 1], "padding": "valid", "dilation_rate": [1, 1], "groups": 1,
         "activation": "linear", "use_bias": True, **_LAST}  # fmt: skip
_POOL = {"pool_size": [2, 2], "strides": [2, 2], "padding": "valid", **_LAST}
_GLOBAL = {"keepdims": False, **_LAST}
SETTINGS = {
    "Conv2D": _CONV, "DepthwiseConv2D": _CONV, "SeparableConv2D": _CONV,
    "Dense": {"activation": "linear", "use_bias": True},
    "BatchNormalization": {"axis": -1, "epsilon": 1e-3, "center": True, "scale": True},
    "ReLU": {"max_value": None, "negative_slope": 0.0, "threshold": 0.0},
    "MaxPooling2D": _POOL, "AveragePooling2D": _POOL,
    "GlobalAveragePooling2D": _GLOBAL, "GlobalMaxPooling2D": _GLOBAL,
    "ZeroPadding2D": _LAST, "Cropping2D": _LAST, "Flatten": _LAST,
    "Concatenate": {"axis": -1}, "Softmax": {"axis": -1}, "Rescaling": {"offset": 0.0},
    "Normalization": {"axis": [-1], "invert": False, "mean": None, "variance": None},
}  # fmt: skip
"""What Keras writes into a layer's configuration where nothing else was asked for."""

LAYOUTS = ("2.15.0 h5", "3.15.1 h5", "2.15.0 keras", "3.15.1 keras")


@dataclasses.dataclass
class Node:
    """One layer: `weights` in the order of its own variables, `inner` the nodes of a nested model.
    `calls` are the inputs of each call as `(layer, call)`; constants follow the tensors."""

    kind: str
    name: str
    config: dict = dataclasses.field(default_factory=dict)
    calls: list = dataclasses.field(default_factory=list)
    weights: dict = dataclasses.field(default_factory=dict)
    inner: list | None = None


def chain(*nodes):
    """Each node reads the one before, unless it says what it reads."""
    for before, node in itertools.pairwise(nodes):
        node.calls = node.calls or [[(before.name, 0)]]
    return list(nodes)


def image(*shape, name="input_1"):
    return Node("InputLayer", name, {"shape": list(shape)})


def config_of(nodes, name, version, kind="Functional", output=None):
    keras_2 = version.startswith("2")
    layers = [_layer(node, nodes, keras_2, kind) for node in nodes]
    config = {"name": name, "trainable": True, "layers": layers}
    if kind == "Functional":
        first, last = [nodes[0].name, 0, 0], [output or nodes[-1].name, 0, 0]
        config |= {
            "input_layers": [first] if keras_2 else first,
            "output_layers": [last] if keras_2 else last,
        }
    return {"class_name": kind, "config": config}


def _layer(node, nodes, keras_2, kind):
    config = {"name": node.name, "trainable": True, "dtype": "float32"}
    config |= {**SETTINGS.get(node.kind, {}), **node.config}
    if node.kind == "InputLayer":
        shape = [None, *config.pop("shape")]
        config["batch_input_shape" if keras_2 else "batch_shape"] = shape
    if node.inner is not None:
        config = config_of(node.inner, node.name, "2" if keras_2 else "3", node.kind)["config"]
    entry = {"class_name": node.kind, "config": config}
    if kind == "Functional":
        models = {n.name for n in nodes if n.inner is not None}
        entry |= {
            "name": node.name,
            "inbound_nodes": [_call(c, keras_2, models) for c in node.calls],
        }
    return entry


def _call(call, keras_2, models):
    tensors = [item for item in call if isinstance(item, tuple)]
    constants = [item for item in call if not isinstance(item, tuple)]
    if keras_2:
        # Keras 2 counts a nested model's own making as its call 0.
        rows = [[name, at + (name in models), 0, {}] for name, at in tensors]
        if constants:
            return [*rows[0][:3], {"y": constants[0], "name": None}]
        return rows
    made = [
        {
            "class_name": "__keras_tensor__",
            "config": {"shape": [None], "dtype": "float32", "keras_history": [name, at, 0]},
        }
        for name, at in tensors
    ]
    merged = [made] if len(made) > 1 else made
    return {"args": [*merged, *constants], "kwargs": {"mask": None}}


def write(path, nodes, layout, *, name="model", kind="Functional", output=None, model=None):
    """One file in a layout; returns its path, `model.h5` or `model.keras` in the folder `path`."""
    version, form = layout.split()
    model = config_of(nodes, name, version, kind, output) if model is None else model
    path = path / f"model.{form}"
    if form == "h5":
        with h5py.File(path, "w") as file:
            file.attrs["model_config"] = json.dumps(model).encode()
            file.attrs["keras_version"], file.attrs["backend"] = version, "jax"
            write_listed(file.create_group("model_weights"), nodes, version)
            file.create_dataset("optimizer_weights/momentum", data=np.zeros(3))
        return path
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        write_numbered(file, nodes)
        file.create_dataset("optimizer/vars/0", data=np.int64(7))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": version}))
        archive.writestr("config.json", json.dumps(model))
        archive.writestr("model.weights.h5", buffer.getvalue())
    return path


def write_weights(path, nodes, layout):
    """A file of weights only, as `model.save_weights` writes it in either layout."""
    version, form = layout.split()
    path = path / ("model.weights.h5" if form == "keras" else "weights.h5")
    with h5py.File(path, "w") as file:
        if form == "keras":
            write_numbered(file, nodes)
        else:
            write_listed(file, nodes, version)
    return path


def write_listed(group, nodes, version, chunks=1):
    """The older layout of weights."""
    keras_2 = version.startswith("2")
    names = [node.name.encode() for node in nodes]
    if chunks == 1:
        group.attrs["layer_names"] = names
    for index in range(chunks if chunks > 1 else 0):
        group.attrs[f"layer_names{index}"] = np.array_split(names, chunks)[index]
    group.attrs["keras_version"] = version.encode()
    for node in nodes:
        inside = group.create_group(node.name)
        variables = {}
        for owner in [node, *(node.inner or [])]:
            for variable, array in owner.weights.items():
                if keras_2 and owner.kind == "DepthwiseConv2D" and variable == "kernel":
                    variable = "depthwise_kernel"
                variables[f"{owner.name}/{variable}" + (":0" if keras_2 else "")] = array
        inside.attrs["weight_names"] = [variable.encode() for variable in variables]
        for variable, array in variables.items():
            inside.create_dataset(variable, data=array)
    group.create_group("top_level_model_weights").attrs["weight_names"] = np.zeros(0, "S1")


def write_numbered(group, nodes):
    """The newer layout of weights."""
    counts = {}
    for node in nodes:
        kind = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", node.kind)
        kind = re.sub(r"([a-z])([A-Z])", r"\1_\2", kind).lower()
        counts[kind] = counts.get(kind, -1) + 1
        folder = group.create_group(f"layers/{kind}" + (f"_{counts[kind]}" if counts[kind] else ""))
        variables = folder.create_group("vars")
        variables.attrs["name"] = node.name
        for index, array in enumerate(node.weights.values()):
            variables.create_dataset(str(index), data=array)
        if node.inner is not None:
            write_numbered(folder, node.inner)

"""From the configuration of a Keras model to the calls of its layers, in the order they run.

Sequential and Functional models, nested ones unrolled; both ways of writing them (Keras 2 lists
`[["conv", 0, 0, {}]]`, Keras 3 `{"args": [{"class_name": "__keras_tensor__", ...}]}`). Nothing
here knows what a layer does.
"""

from __future__ import annotations

import dataclasses
import graphlib
import heapq
import re
from collections.abc import Iterator
from typing import Any

from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.keras_file import Address

MODELS = ("Sequential", "Functional", "Model")
"""Classes that hold layers; Keras wrote `Model` for a functional one before 2.3."""

IMAGE = "#image"
_MAX_NESTING = 16
_PASSED_OVER = ("name", "mask", "training")
_Node = tuple[tuple[str, int], list[tuple[str, int]], list[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of one layer.

    Attributes:
      key: names its result; `inputs` are keys of earlier calls, or `IMAGE`.
      kind: class of the layer, or `tf.math.add` and the like for a TensorFlow function.
      constants: arguments that are no tensors, in order.
    """

    key: str
    kind: str
    name: str
    config: dict[str, Any]
    inputs: tuple[str, ...]
    constants: tuple[Any, ...]
    address: Address


@dataclasses.dataclass(frozen=True, kw_only=True)
class KerasNetwork:
    """The calls a model's output needs, in order; `input_shape` as the file has it, with None for
    free sizes and without the batch, or None where it is not said."""

    name: str
    calls: tuple[Call, ...]
    output: str
    input_shape: tuple[int | None, ...] | None


def read_calls(model: dict[str, Any]) -> KerasNetwork:
    """The calls of a `{"class_name", "config"}` description.

    Raises:
      ReaderError: a class that is no Sequential or Functional model, several inputs or outputs,
        a cycle, or what Keras does not write.
    """
    try:
        expander = _Expander()
        output = expander.expand(model, (), "", IMAGE)
        return KerasNetwork(name=str(model["config"].get("name", "keras_model")),
                            calls=tuple(expander.calls), output=output,
                            input_shape=expander.input_shape)  # fmt: skip
    except ReaderError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
        raise ReaderError(
            f"found a model configuration that Keras does not write ({error!r}), expected that of "
            "a Sequential or Functional model"
        ) from error


class _Expander:
    """Collects the calls of a model and of the models in it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.input_shape: tuple[int | None, ...] | None = None

    def expand(self, model: dict[str, Any], names: tuple[str, ...], folder: str, image: str) -> str:
        """Appends a model's calls with `image` as its input; returns the key of its output."""
        kind, config = model["class_name"], model["config"]
        if kind not in MODELS:
            raise ReaderError(
                f"found a model of class {kind!r}, expected a Sequential or Functional one: a "
                "subclass's code is not in the file; rebuild it as keras.Model(inputs, outputs)"
            )
        if len(names) > _MAX_NESTING:
            raise ReaderError(f"found models nested over {_MAX_NESTING} deep at {names[:3]}")
        if isinstance(config, list):  # Keras before 2.2.3 wrote a Sequential so
            config = {"layers": config}
        nodes, output, entry = _functional(config) if kind != "Sequential" else _sequential(config)
        layers = {_name(layer): layer for layer in config["layers"]}
        if len(layers) < len(config["layers"]):
            raise ReaderError(f"found two layers of one name among {list(layers)[:8]}")
        folders = dict(_folders(config["layers"], folder))
        results: dict[tuple[str, int], str] = {}
        for (name, index), inputs, constants in _in_order(nodes, output):
            layer = layers[name]
            keys = tuple(results[reference] for reference in inputs)
            if layer["class_name"] == "InputLayer":
                if name != entry:
                    raise ReaderError(f"found a second input {name!r}, expected one image")
                results[name, index] = image
                self._see_shape(layer, image)
                continue
            keys = keys or (image,)  # the first layer of a Sequential
            if keys == (IMAGE,):
                self._see_shape(layer, image)
            if layer["class_name"] in MODELS:
                if len(keys) != 1:
                    raise ReaderError(f"found model {name!r} with {len(keys)} inputs, expected one")
                results[name, index] = self.expand(layer, (*names, name), folders[name], keys[0])
                continue
            call = Call(key=f"{len(self.calls)}", kind=_kind(layer), name=name,
                        config=layer["config"], inputs=keys, constants=tuple(constants),
                        address=Address(names=(*names, name), folder=folders[name]))  # fmt: skip
            self.calls.append(call)
            results[name, index] = call.key
        if image == IMAGE and self.input_shape is None and config.get("build_input_shape"):
            self.input_shape = tuple(config["build_input_shape"][1:])
        return results[output]

    def _see_shape(self, layer: dict[str, Any], image: str) -> None:
        config = layer["config"]
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        if image == IMAGE and self.input_shape is None and shape:
            self.input_shape = tuple(shape[1:])


def _name(layer: dict[str, Any]) -> str:
    return str(layer.get("name") or layer["config"]["name"])


def _kind(layer: dict[str, Any]) -> str:
    if layer["class_name"] == "TFOpLambda":
        return f"tf.{layer['config'].get('function')}"
    return str(layer["class_name"])


def _folders(layers: list[dict[str, Any]], folder: str) -> Iterator[tuple[str, str]]:
    """`(layer, folder)` as Keras 3 calls them: the class in snake case, counted."""
    counts: dict[str, int] = {}
    for layer in layers:
        kind = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", layer["class_name"]))
        kind = re.sub(r"([a-z])([A-Z])", r"\1_\2", kind).lower()
        counts[kind] = counts.get(kind, -1) + 1
        count = f"_{counts[kind]}" if counts[kind] else ""
        yield _name(layer), f"{folder}/layers/{kind}{count}".removeprefix("/")


def _sequential(config: dict[str, Any]) -> tuple[list[_Node], tuple[str, int], str | None]:
    names = [_name(layer) for layer in config["layers"]]
    nodes: list[_Node] = [
        ((name, 0), [(before, 0)] if before else [], [])
        for before, name in zip([None, *names], names, strict=False)
    ]
    return nodes, (names[-1], 0), names[0]


def _functional(config: dict[str, Any]) -> tuple[list[_Node], tuple[str, int], str | None]:
    nodes: list[_Node] = []
    for layer in config["layers"]:
        found = layer.get("inbound_nodes") or ([[]] if layer["class_name"] == "InputLayer" else [])
        # Keras 2 counts a nested model's own making as its call 0.
        first = int(layer["class_name"] in MODELS and not isinstance(next(iter(found), {}), dict))
        nodes += [
            ((_name(layer), index), *_arguments(node, _name(layer)))
            for index, node in enumerate(found, first)
        ]
    entry = _only_tensor(config["input_layers"], "inputs")
    return nodes, _only_tensor(config["output_layers"], "outputs"), entry[0]


def _only_tensor(references: Any, what: str) -> tuple[str, int]:
    """The one `[layer, call, tensor]` of a model's inputs or outputs."""
    if isinstance(references, dict):
        references = list(references.values())
    if len(references) == 3 and isinstance(references[0], str):  # Keras 3 leaves the list out
        references = [references]
    if len(references) != 1:
        raise ReaderError(
            f"found a model with {len(references)} {what}, expected one image in and one vector "
            "of logits out: save keras.Model(inputs, logits)"
        )
    return _reference(references[0])


def _reference(reference: Any) -> tuple[str, int]:
    name, call, tensor = reference[:3]
    if tensor != 0:
        raise ReaderError(f"found tensor {tensor} of layer {name!r}, expected layers of one output")
    return str(name), int(call)


def _arguments(node: Any, layer: str) -> tuple[list[tuple[str, int]], list[Any]]:
    """Tensors and constants that one call of a layer is given."""
    tensors: list[tuple[str, int]] = []
    constants: list[Any] = []
    settings: dict[str, Any] = {}

    def take(value: Any) -> None:
        if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
            tensors.append(_reference(value["config"]["keras_history"]))
        elif isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
            tensors.append(_reference(value))
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            for item in value:
                take(item)
        elif value is not None:
            constants.append(value)

    if isinstance(node, dict):
        take(list(node["args"]))
        settings = node.get("kwargs") or {}
    elif node:
        for item in [node] if isinstance(node[0], str) else node:
            take(item[:3])
            settings = settings | (item[3] if len(item) > 3 else {})
    if settings.get("training"):
        raise ReaderError(
            f"found layer {layer!r} called with training=True, expected a model as it is evaluated"
        )
    for name, value in settings.items():
        if name not in _PASSED_OVER:
            take(value)
    return tensors, constants


def _in_order(nodes: list[_Node], output: tuple[str, int]) -> Iterator[_Node]:
    """The nodes `output` needs, each after its inputs, else as the file has them."""
    by_key = {key: (position, inputs) for position, (key, inputs, _) in enumerate(nodes)}
    wanted, waiting = set(), [output]
    while waiting:
        if (key := waiting.pop()) not in wanted:
            if key not in by_key:
                raise ReaderError(f"found no call {key[1]} of a layer {key[0]!r}, which is read")
            wanted.add(key)
            waiting += by_key[key][1]
    sorter = graphlib.TopologicalSorter({key: by_key[key][1] for key in wanted})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise ReaderError(f"found layers that read each other: {error.args[1][:4]}") from error
    ready: list[int] = []
    while sorter.is_active():
        for key in sorter.get_ready():
            heapq.heappush(ready, by_key[key][0])
        node = nodes[heapq.heappop(ready)]
        yield node
        sorter.done(node[0])

"""A whole Keras model becomes a teacher: its network is read from its configuration."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from lrq_jax.data import Preprocessing
from lrq_jax.graph import Graph
from lrq_jax.graph import layers as L
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.keras_config import KerasNetwork, read_calls
from lrq_jax.readers.keras_file import KerasFile
from lrq_jax.readers.keras_layers import LAYERS
from lrq_jax.readers.keras_translator import Translator, Value
from lrq_jax.readers.teacher import Teacher, Variables

Triple = tuple[float, float, float]

_MODES = (
    "keras.applications' are: 'tf' (MobileNet, Inception, Xception) mean and std 0.5,0.5,0.5; "
    "'torch' (DenseNet) mean 0.485,0.456,0.406 and std 0.229,0.224,0.225"
)
_CROPPED_FROM = 128
"""Pixels from which on images are taken to be resized and cropped, as for ImageNet."""


def read_keras_model(file: KerasFile, *, num_classes: int | None = None,
                     mean: Triple | None = None, std: Triple | None = None,
                     size: int | None = None) -> Teacher:  # fmt: skip
    """The teacher in a whole Keras model.

    A softmax at its end is dropped, a normalisation at its start (Rescaling, Normalization or
    arithmetic with constants) becomes the teacher's preprocessing.

    Args:
      file: what `read_keras_file` found, with a model.
      num_classes: checked against the model where given.
      mean, std: of pixels scaled to [0, 1], what the model's first layer expects. Needed where the
        model has no normalisation of its own; where it has one, pixels of 0 to 255 enter it
        unless these say otherwise.
      size: side of the square input in pixels, where the model leaves it free.

    Raises:
      ReaderError: layers that are not supported, by class and name, or settings of theirs.
    """
    if file.model is None:
        raise ReaderError("found weights only, expected a whole model")
    network = read_calls(file.model)
    _check_kinds(network)
    shape = _input_shape(network, size)
    translator = Translator(_identifier(network.name), shape, file.weights, file.version)
    try:
        entry, softmax = _translate(translator, network)
        graph = translator.net.build()
    except L.GraphError as error:
        raise ReaderError(f"found a network that cannot be: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, ReaderError):
            raise
        raise ReaderError(f"found a layer configured as Keras does not ({error!r})") from error
    graph, variables = _dense_head(graph, translator.variables)
    _check_head(graph, num_classes)
    how, origin = image_preprocessing(entry, mean, std, shape[0])
    version = f"Keras {file.version}" if file.version else "Keras"
    notes = [f"network read from the configuration of a {version} model", origin]
    if how.resize is not None:
        notes.append(f"images: shorter side to {how.resize} pixels, centre cropped; the common "
                     "recipe, the file does not say")  # fmt: skip
    if softmax:
        notes.append("left out the softmax at the end: logits come out")
    if translator.left_out:
        notes.append(f"left out, as they do nothing here: {', '.join(translator.left_out)}")
    if translator.completed:
        notes.append(f"batch norms without scale or centre got ones or zeros: "
                     f"{', '.join(translator.completed)}")  # fmt: skip
    if not graph.batch_norms:
        notes.append("it has no BatchNormalization: there are no statistics to synthesise from")
    return Teacher(graph=graph, variables=variables, preprocessing=how, arch=graph.name,
                   notes=tuple(notes))  # fmt: skip


def _check_kinds(network: KerasNetwork) -> None:
    wrong = [f"{call.kind} {'/'.join(call.address.names)!r}" for call in network.calls
             if call.kind not in LAYERS]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 8} more" if wrong[8:] else ""
        way_out = "keep them out of the model, or convert its ONNX export"
        if any(name.startswith("Lambda") for name in wrong):
            way_out = "a Lambda holds code, which is never executed: replace it by a layer"
        raise ReaderError(
            f"found layers that are not supported: {', '.join(wrong[:8])}{more}; expected only "
            f"{', '.join(sorted(LAYERS))}: {way_out}"
        )


def _input_shape(network: KerasNetwork, size: int | None) -> tuple[int, int, int]:
    found = network.input_shape
    if found is None or len(found) != 3 or not all(n is None or isinstance(n, int) for n in found):
        raise ReaderError(f"found input shape {found}, expected an image (height, width, channels)")
    height, width = (size, size) if size is not None else found[:2]
    channels = found[2]
    if height is None or width is None:
        raise ReaderError(
            f"found input shape {found} with a free size, expected one: choose it with --size"
        )
    if height != width or channels not in (1, 3):
        raise ReaderError(
            f"found input shape {found}, expected a square image of 1 or 3 channels, last"
        )
    return height, width, channels


def _identifier(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name) or "keras_model"


def _translate(t: Translator, network: KerasNetwork) -> tuple[Value, bool]:
    """Builds the graph; returns the image as the first layers read it, and whether a softmax was
    left out at the end."""
    values = {"#image": t.image}
    for call in network.calls:
        values[call.key] = LAYERS[call.kind](t, call, *(values[key] for key in call.inputs))
    output = values[network.output]
    if output.scale is not None or output.padding != ((0, 0), (0, 0)):
        raise ReaderError("found a model without layers, expected a classifier")
    return t.entry, output.softmax


def _dense_head(graph: Graph, variables: Variables) -> tuple[Graph, Variables]:
    """A 1x1 convolution of one pixel that is then flattened (MobileNet) as the dense layer it is."""
    ends: tuple[Any, ...] = (None, None, *graph.layers)
    *rest, conv, flat = ends
    if not (isinstance(flat, L.Flatten) and isinstance(conv, L.Conv) and conv.groups == 1
            and flat.inputs == (conv.name,) and conv.kernel_size == (1, 1)
            and conv.padding == ((0, 0), (0, 0))
            and graph.shapes[conv.inputs[0]][:2] == (1, 1)):  # fmt: skip
        return graph, variables
    layers = [layer for layer in rest if layer is not None]
    (source,) = conv.inputs
    before = layers[-1]
    if isinstance(before, L.Unflatten) and before.name == source:
        source = layers.pop().inputs[0]
    else:
        layers.append(L.Flatten(name=flat.name, inputs=(source,)))
        source = flat.name
    head = L.Dense(name=conv.name, inputs=(source,), features=conv.features, use_bias=conv.use_bias)
    params = dict(variables["params"])
    params[conv.name] = params[conv.name] | {"kernel": params[conv.name]["kernel"][0, 0]}
    return dataclasses.replace(graph, layers=(*layers, head)), variables | {"params": params}


def _check_head(graph: Graph, num_classes: int | None) -> None:
    last = graph.layers[-1]
    if not isinstance(last, L.Dense) or last.features < 2:
        found = f"{type(last).__name__} {last.name!r} of shape {graph.shapes[last.name]}"
        raise ReaderError(
            f"found {found} at the end, expected a Dense layer of two classes or more, with softmax "
            "or nothing behind it"
        )
    if num_classes is not None and num_classes != last.features:
        raise ReaderError(
            f"found {last.features} classes in the file, expected the {num_classes} asked for: "
            "leave --num-classes out or choose another file"
        )


def image_preprocessing(entry: Value, mean: Triple | None, std: Triple | None,
                   size: int) -> tuple[Preprocessing, str]:  # fmt: skip
    """How to prepare images, and a sentence on where that comes from."""
    scale, offset = np.asarray(entry.scale), np.asarray(entry.offset)
    own = bool((scale != 1).any() or (offset != 0).any())
    if (mean is None) != (std is None):
        raise ReaderError("found only one of mean and std, expected both or none")
    if mean is None and not own:
        raise ReaderError(
            "found no normalisation in the model, expected --mean R,G,B --std R,G,B (pixels scaled "
            f"to [0, 1]) as it was trained with; {_MODES}"
        )
    if mean is not None and std is not None and max(*mean, *std) > 1:
        raise ReaderError(
            f"found mean {mean} and std {std}, expected units of pixels scaled to [0, 1]: divide "
            "numbers for pixels of 0 to 255 by 255"
        )
    if (scale <= 0).any():
        raise ReaderError(f"found the image scaled by {scale.tolist()}, expected positive numbers")
    before_mean = np.zeros(3) if mean is None else np.asarray(mean)
    before_std = np.full(3, 1 / 255) if std is None else np.asarray(std)
    channels = len(scale)
    if channels == 1:
        before_mean, before_std = before_mean[:1], before_std[:1]
    # scale * (p - mean) / std + offset, written as (p - mean') / std'
    final_std = before_std / scale
    final_mean = before_mean - offset * final_std
    resize = round(size * 256 / 224) if size >= _CROPPED_FROM else None
    how = Preprocessing(mean=tuple(final_mean), std=tuple(final_std), size=size, resize=resize)
    origin = "as given"
    if own:
        kind = "of 0 to 255" if mean is None else "normalised as given"
        origin = f"the model's own first layers, on pixels {kind}"
    return how, f"normalisation: {origin}"

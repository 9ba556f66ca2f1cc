"""lrq_jax.graph: what a network may be, how it is refused, and what it says about itself."""

import copy
import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lrq_jax.graph import INPUT, Graph, GraphBuilder, GraphError, graph_from_dict, graph_to_dict
from lrq_jax.graph import layers as L
from lrq_jax.passes import float_forward

LAYER_TYPES = {
    kind
    for kind in vars(L).values()
    if isinstance(kind, type) and issubclass(kind, L.Layer) and kind is not L.Layer
}


def _everything():
    """A graph of every layer type with no setting left at its default."""
    net = GraphBuilder("everything", input_shape=(13, 11, 4))
    x = net.conv(net.image, 6, (3, 2), strides=(1, 2), padding=((1, 0), (2, 1)), dilation=(2, 1),
                 groups=2, use_bias=True, name="first")  # fmt: skip
    x = net.batch_norm(x, eps=1e-3, affine=False)
    x = net.activation(x, "leaky_relu", negative_slope=0.2)
    y = net.relu6(net.conv(x, 6, 1))
    x = net.add(x, y)
    x = net.concat(x, y, x)
    x = net.pad(x, height=(1, 2), width=(0, 1), channels=(3, 1))
    x = net.slice(x, start=(1, 0, 2), stop=(None, 7, -1), step=(1, 1, 2))
    x = net.max_pool(x, (3, 2), strides=(2, 1), padding=((1, 0), (0, 1)))
    y = net.avg_pool(x, 3, strides=1, padding=1, count_include_pad=False)
    x = net.add(x, y)
    gate = net.unflatten(net.global_pool(x, name="squeeze"))
    x = net.channel_shuffle(net.multiply(x, net.activation(gate, "sigmoid")), 10)
    y = net.global_pool(net.avg_pool(x, (2, 3)), name="pool0")
    x = net.dense(net.flatten(x), 9, use_bias=False)
    net.dense(net.concat(x, y), 7)
    return net.build()


def _random_graph(rng, length):
    """A graph of `length` or more layers in which every layer reaches the output."""
    net = GraphBuilder("random", input_shape=(4, 4, 2))
    tensors = [net.image]
    for _ in range(length):
        # Recent tensors more often: chains, so that some tensors do cut the graph.
        x, y = (tensors[-1 - min(int(rng.geometric(0.6)) - 1, len(tensors) - 1)] for _ in "xy")
        tensors.append(net.add(x, y) if rng.random() < 0.4 else net.relu(x))
    read = {name for layer in net._layers for name in layer.inputs}
    loose = [name for name in tensors[1:] if name not in read]
    x = loose[0]
    for other in loose[1:]:
        x = net.add(x, other)
    net.global_pool(x)
    return net.build()


def _reaches_output_without(graph, removed):
    """Whether a path leads from the image to the logits past the removed tensor."""
    reached = {INPUT}
    for _ in graph.layers:
        reached |= {
            layer.name
            for layer in graph.layers
            if layer.name != removed and reached & set(layer.inputs)
        }
    return graph.output in reached


# ---- shapes ------------------------------------------------------------------------------------


def _positions(size, reach, stride, padding):
    padded = size + sum(padding)
    return sum(1 for start in range(0, padded, stride) if start + reach <= padded)


def test_window_shapes_count_the_windows_that_fit(rng):
    checked = 0
    for _ in range(400):
        size, kernel = rng.integers(1, 12, 2), rng.integers(1, 5, 2)
        stride, dilation = rng.integers(1, 4, 2), rng.integers(1, 4, 2)
        padding = rng.integers(0, 4, (2, 2))
        reach = dilation * (kernel - 1) + 1
        expected = tuple(
            _positions(*axis) for axis in zip(size, reach, stride, padding, strict=True)
        )
        layer = L.Conv(
            name="c", inputs=(INPUT,), features=5, kernel_size=tuple(kernel),
            strides=tuple(stride), padding=tuple(map(tuple, padding)), dilation=tuple(dilation),
        )  # fmt: skip
        if min(expected) == 0:
            with pytest.raises(GraphError, match=r"'c'.*found a padded input.*at least the window"):
                layer.output_shape((*size, 3))
            continue
        assert layer.output_shape((*size, 3)) == (*expected, 5)
        checked += 1
        pool = L.AvgPool(name="p", inputs=(INPUT,), window=tuple(reach), strides=tuple(stride),
                         padding=tuple(map(tuple, padding)))  # fmt: skip
        if all(pad.max() < r for pad, r in zip(padding, reach, strict=True)):
            assert pool.output_shape((*size, 3)) == (*expected, 3)
    assert checked > 200


def test_inferred_shapes_are_those_the_forward_makes():
    graph = _everything()
    variables = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        graph.variable_shapes(), is_leaf=lambda node: isinstance(node, tuple),
    )  # fmt: skip
    names = tuple(graph.by_name)
    images = jax.ShapeDtypeStruct((2, *graph.input_shape), jnp.float32)
    made = jax.eval_shape(lambda v, x: float_forward(graph, v, x, names), variables, images)
    assert {name: value.shape[1:] for name, value in made.items()} == {
        name: shape for name, shape in graph.shapes.items() if name != INPUT
    }
    assert graph.shapes[INPUT] == (13, 11, 4)


def test_tf_same_is_the_formula_of_tensorflow():
    for size in range(1, 14):
        for kernel, stride, dilation in [(1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 2, 1), (1, 2, 1),
                                         (5, 3, 1), (3, 2, 2), (4, 1, 3), (7, 2, 1)]:  # fmt: skip
            net = GraphBuilder("n", input_shape=(size, 30, 3))
            x = net.conv(net.image, 1, (kernel, 3), strides=(stride, 2), padding="tf_same",
                         dilation=(dilation, 1), name="c")  # fmt: skip
            reach = dilation * (kernel - 1) + 1
            height = lax.padtype_to_pads((size,), (reach,), (stride,), "SAME")[0]
            assert net._layers[0].padding == (height, (0, 1))
            assert height[1] - height[0] in (0, 1)
            assert net.shape(x) == (-(-size // stride), 15, 1)
    net = GraphBuilder("n", input_shape=(7, 8, 3))
    net.max_pool(net.image, 3, strides=2, padding="tf_same")
    assert net._layers[0].padding == ((1, 1), (0, 1))


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (5, 1), (7, 3), (3, 2)])
def test_same_is_symmetric_and_keeps_the_size_of_odd_kernels(kernel, dilation):
    net = GraphBuilder("n", input_shape=(9, 8, 3))
    kept = net.conv(net.image, 2, kernel, dilation=dilation)
    halved = net.conv(net.image, 2, kernel, strides=2, dilation=dilation)
    assert net.shape(kept) == (9, 8, 2)
    assert net.shape(halved) == (5, 4, 2)
    assert net._layers[0].padding == ((dilation * (kernel // 2),) * 2,) * 2


@pytest.mark.parametrize(
    ("given", "explicit"),
    [
        (2, ((2, 2), (2, 2))),
        ((1, 2), ((1, 1), (2, 2))),
        (((0, 1), (2, 3)), ((0, 1), (2, 3))),
        ((1, (2, 3)), ((1, 1), (2, 3))),
    ],
)
def test_padding_in_every_notation(given, explicit):
    net = GraphBuilder("n", input_shape=(9, 9, 1))
    net.conv(net.image, 1, 5, padding=given)
    net.avg_pool(net.image, 5, strides=1, padding=given)
    assert [layer.padding for layer in net._layers] == [explicit, explicit]


# ---- refusals ----------------------------------------------------------------------------------


def _net():
    net = GraphBuilder("net", input_shape=(8, 8, 6))
    net.conv(net.image, 4, 3, name="wide")
    net.conv(net.image, 5, 3, name="wider")
    net.global_pool("wide", name="vector")
    return net


IMPOSSIBLE = {
    "window": (lambda n: n.conv("wide", 4, 5, padding=0, dilation=3, name="x"),
               "padded input of 8 along axis H", "reach of 13"),
    "window on one axis": (lambda n: n.max_pool("wide", (2, 9), name="x"),
                           "padded input of 8 along axis W", "reach of 9"),
    "unequal sum": (lambda n: n.add("wide", "wider", name="x"),
                    r"\(8, 8, 4\) \('wide'\) and \(8, 8, 5\) \('wider'\)", "two equal shapes"),
    "duplicate": (lambda n: n.relu("wide", name="wider"), "name in use", "new name"),
    "the image's name": (lambda n: n.relu("wide", name=INPUT), "name in use", "new name"),
    "unknown to an add": (lambda n: n.add("wide", "typo", name="x"), r"\['typo'\]", "'wider'"),
    "unknown to a conv": (lambda n: n.conv("typo", 4, 3, name="x"), r"\['typo'\]", "'wider'"),
    "unknown, tf_same": (lambda n: n.conv("typo", 4, 3, padding="tf_same", name="x"),
                         r"\['typo'\]", "'wider'"),
    "unknown to a pool": (lambda n: n.max_pool("typo", 2, name="x"), r"\['typo'\]", "'wider'"),
    "dense on an image": (lambda n: n.dense("wide", 3, name="x"), r"\(8, 8, 4\)", "a vector"),
    "conv on a vector": (lambda n: n.conv("vector", 3, 1, name="x"), r"\(4,\)", "an image"),
    "tf_same on a vector": (lambda n: n.conv("vector", 3, 1, padding="tf_same", name="x"),
                            r"\(4,\)", "an image"),
    "pool on a vector": (lambda n: n.avg_pool("vector", 1, name="x"), r"\(4,\)", "an image"),
    "global pool on a vector": (lambda n: n.global_pool("vector", name="x"), r"\(4,\)", "an image"),
    "pad on a vector": (lambda n: n.pad("vector", name="x"), r"\(4,\)", "an image"),
    "slice on a vector": (lambda n: n.slice("vector", name="x"), r"\(4,\)", "an image"),
    "groups of the input": (lambda n: n.conv("wider", 4, 3, groups=2, name="x"),
                            "5 input and 4 output channels", "divisible by groups=2"),
    "groups of the output": (lambda n: n.conv("wide", 5, 3, groups=2, name="x"),
                             "4 input and 5 output channels", "divisible by groups=2"),
    "no groups": (lambda n: n.conv("wide", 4, 3, groups=0, name="x"), "0 groups", "at least one"),
    "no features": (lambda n: n.conv("wide", 0, 3, name="x"), "0 features", "at least one"),
    "no classes": (lambda n: n.dense("vector", 0, name="x"), "0 features", "at least one"),
    "no stride": (lambda n: n.conv("wide", 4, 3, strides=(1, 0), name="x"),
                  r"strides \(1, 0\)", "from 1 up"),
    "no stride, tf_same": (lambda n: n.max_pool("wide", 2, strides=0, padding="tf_same", name="x"),
                           r"strides \(0, 0\)", "from 1 up"),
    "no window": (lambda n: n.max_pool("wide", 0, strides=1, name="x"),
                  r"window \(0, 0\)", "from 1 up"),
    "no dilation": (lambda n: n.conv("wide", 4, 3, dilation=0, padding=0, name="x"),
                    r"dilation \(0, 0\)", "from 1 up"),
    "negative padding": (lambda n: n.conv("wide", 4, 3, padding=((0, -1), (0, 0)), name="x"),
                         r"padding \(0, -1, 0, 0\)", "from 0 up"),
    "a pool of padding alone": (lambda n: n.avg_pool("wide", 2, padding=2, name="x"),
                                r"padding \(\(2, 2\), \(2, 2\)\)", "less than the window"),
    "padding's name": (lambda n: n.conv("wide", 4, 3, padding="valid", name="x"),
                       "'valid'", "'same' or 'tf_same'"),
    "activation's name": (lambda n: n.activation("wide", "tanh", name="x"), "'tanh'", "'relu6'"),
    "negative pad": (lambda n: n.pad("wide", width=(0, -1), name="x"), r"\(0, -1\)", "use Slice"),
    "empty slice": (lambda n: n.slice("wide", start=(8, 0, 0), name="x"), "slice", "something left"),
    "slice that stands": (lambda n: n.slice("wide", step=(1, 0, 1), name="x"), "slice", "step >= 1"),
    "slice from the end": (lambda n: n.slice("wide", start=(0, 0, -1), name="x"),
                           "slice", "start >= 0"),
    "concat of image and vector": (lambda n: n.concat("wide", "vector", name="x"),
                                   r"\(8, 8, 4\), \(4,\)", "equal shapes but for the channels"),
    "concat of one": (lambda n: n.concat("wide", name="x"), "1 inputs", "two or more"),
    "concat of none": (lambda n: n.concat(name="x"), "0 inputs", "two or more"),
    "sum of one": (lambda n: n.add_layer(L.Add(name="x", inputs=("wide",))), "1 inputs", "2"),
    "ReLU of two": (lambda n: n.add_layer(L.Activation(name="x", inputs=("wide", "wider"))),
                    "2 inputs", "1"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_layer_is_refused_by_name_with_found_and_expected(case):
    make, found, expected = IMPOSSIBLE[case]
    net = _net()
    layers = list(net._layers)
    with pytest.raises(
        GraphError, match=f"layer '(x|wider|image)'.*found .*{found}.*expected .*{expected}"
    ):
        make(net)
    assert net._layers == layers, "a refused layer must leave nothing behind"


def _graph(*layers, input_shape=(8, 8, 4)):
    return Graph(name="net", input_shape=input_shape, layers=layers)


def _relu(name, *inputs):
    return L.Activation(name=name, inputs=inputs or (INPUT,))


def test_a_graph_made_without_the_builder_is_checked_as_well():
    with pytest.raises(GraphError, match=r"'net': found layers that do not reach.*'c'.*'a', 'b'"):
        _graph(_relu("a"), _relu("b", "a"), _relu("c"))
    with pytest.raises(GraphError, match=r"'b'.*found unknown inputs \['c'\].*earlier layers"):
        _graph(_relu("b", "c"), _relu("c", "b"))
    with pytest.raises(GraphError, match="found name 'a', expected a new name"):
        _graph(_relu("a"), _relu("a", "a"))
    with pytest.raises(GraphError, match="found name 'image'"):
        _graph(_relu(INPUT))
    with pytest.raises(GraphError, match="found name 'a/b', expected a new name without '/'"):
        _graph(_relu("a/b"))
    with pytest.raises(GraphError, match="found name ''"):
        _graph(_relu(""))
    with pytest.raises(GraphError, match=r"'a' \(Activation\): found 2 inputs, expected 1"):
        _graph(_relu("a", INPUT, INPUT))
    with pytest.raises(GraphError, match=r"'a' \(Concat\): found 1 inputs, expected two or more"):
        _graph(L.Concat(name="a", inputs=(INPUT,)))
    with pytest.raises(GraphError, match="'net': found no layers, expected at least one"):
        _graph()
    for shape in ((8, 8), (8, 8, 0), (0, 8, 3), (1, 8, 8, 3)):
        with pytest.raises(GraphError, match=r"'net': found input shape.*expected \(height"):
            _graph(_relu("a"), input_shape=shape)


def test_gates_shuffles_and_pixels_of_the_wrong_shape():
    net = GraphBuilder("net", input_shape=(4, 4, 6))
    with pytest.raises(GraphError, match=r"'s' \(ChannelShuffle\): found 6 channels.*groups=4"):
        net.channel_shuffle(net.image, 4, name="s")
    with pytest.raises(GraphError, match=r"'u' \(Unflatten\): found input shape \(4, 4, 6\)"):
        net.unflatten(net.image, name="u")
    narrow = net.conv(net.image, 3, 1)
    with pytest.raises(GraphError, match=r"'m' \(Multiply\).*expected the second to be"):
        net.multiply(net.image, narrow, name="m")


def test_classifier_must_be_dense_and_tensors_must_exist():
    graph = _graph(_relu("a"))
    with pytest.raises(GraphError, match=r"'a' \(Activation\).*expected a Dense layer"):
        _ = graph.classifier
    with pytest.raises(GraphError, match=r"'net': found no tensor named \['b'\].*\['image', 'a'\]"):
        graph.ancestors(["a", "b"])


# ---- what a graph says of itself ---------------------------------------------------------------


def test_block_outputs_are_exactly_the_tensors_that_cut_the_graph(rng):
    cuts_seen = others_seen = 0
    for length in (1, 2, 3, 5, 8, 13, 21) * 8:
        graph = _random_graph(rng, length)
        cuts = tuple(
            layer.name for layer in graph.layers if not _reaches_output_without(graph, layer.name)
        )
        assert graph.block_outputs == cuts
        cuts_seen += len(cuts)
        others_seen += len(graph.layers) - len(cuts)
    assert min(cuts_seen, others_seen) > 100


def test_ancestors_and_consumers_equal_naive_versions(rng):
    def naive(graph, name):
        if name == INPUT:
            return {INPUT}
        return {name}.union(*(naive(graph, i) for i in set(graph.by_name[name].inputs)))

    graph = _random_graph(rng, 12)
    for name in graph.shapes:
        assert graph.ancestors([name]) == naive(graph, name)
        readers = tuple(layer for layer in graph.layers for i in layer.inputs if i == name)
        assert graph.consumers[name] == readers
    assert graph.ancestors([graph.output]) == set(graph.shapes)
    two = list(graph.shapes)[3:5]
    assert graph.ancestors(two) == naive(graph, two[0]) | naive(graph, two[1])
    assert graph.ancestors([]) == {INPUT}


def test_variables_layers_and_counts_of_everything():
    graph = _everything()
    assert graph.variable_shapes() == {
        "params": {
            "first": {"kernel": (3, 2, 2, 6), "bias": (6,)},
            "conv0": {"kernel": (1, 1, 6, 6)},
            "dense0": {"kernel": (graph.shapes["flatten0"][0], 9)},
            "dense1": {"kernel": (9 + graph.shapes["pool0"][0], 7), "bias": (7,)},
        },
        "batch_stats": {"bn0": {"mean": (6,), "var": (6,)}},
    }
    flat, pooled = graph.shapes["flatten0"][0], graph.shapes["pool0"][0]
    assert graph.num_parameters() == 78 + 36 + 9 * flat + 7 * (9 + pooled) + 7
    assert [layer.name for layer in graph.weighted] == ["first", "conv0", "dense0", "dense1"]
    assert [layer.name for layer in graph.batch_norms] == ["bn0"]
    assert graph.output == graph.classifier.name == "dense1"
    assert graph.features == "concat1"
    assert graph.num_classes == 7


def test_a_graph_never_changes():
    net = _net()
    net.add(net.conv("wide", 5, 1), "wider", name="sum")
    net.dense(net.concat(net.global_pool("sum"), "vector"), 3)
    graph = net.build()
    before = (graph.layers, dict(graph.shapes), graph.output)
    net.relu(graph.output)
    assert (graph.layers, dict(graph.shapes), graph.output) == before
    for thing, field in ((graph, "layers"), (graph, "name"), (graph.layers[0], "features")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)
    twin = graph_from_dict(graph_to_dict(graph))
    assert twin is not graph
    assert {graph: 1}[twin] == 1, "equal graphs must be one static jit argument"
    assert pickle.loads(pickle.dumps(graph)) == copy.deepcopy(graph) == graph
    renamed = dataclasses.replace(graph, name="other")
    assert renamed != graph
    assert renamed.shapes == graph.shapes


def test_layers_that_differ_in_one_setting_differ():
    """Graphs are static arguments of compiled steps: a difference unseen is a wrong program."""
    for layer in _everything().layers:
        for field in dataclasses.fields(layer):
            other = dataclasses.replace(layer, **{field.name: "other"})
            assert other != layer, (layer, field.name)


def test_default_names_are_unique_whatever_names_are_given(rng):
    net = GraphBuilder("n", input_shape=(2, 2, 1))
    names = [INPUT]
    for _ in range(150):
        kind = str(rng.choice(["relu", "relu6", "add", "bn"]))
        given = f"{kind}{rng.integers(0, 200)}" if rng.random() < 0.3 else None
        if given in names:
            given = None
        x = names[-1]
        if kind == "add":
            made = net.add(x, x, name=given)
        elif kind == "bn":
            made = net.batch_norm(x, name=given)
        else:
            made = net.activation(x, kind, name=given)
        assert given in (None, made)
        assert made.startswith(kind)
        names.append(made)
    assert len(set(names)) == 151
    assert [layer.name for layer in net.build().layers] == names[1:]


# ---- serialization -----------------------------------------------------------------------------


def test_every_layer_type_and_setting_survives_json():
    graph = _everything()
    assert {type(layer) for layer in graph.layers} == LAYER_TYPES, "extend _everything()"
    for kind in LAYER_TYPES:
        for field in dataclasses.fields(kind):
            values = [getattr(layer, field.name) for layer in graph.layers if type(layer) is kind]
            assert any(value != field.default for value in values), (kind, field.name)
    text = json.dumps(graph_to_dict(graph))
    read = graph_from_dict(json.loads(text))
    assert read == graph
    assert hash(read) == hash(graph)
    assert read.shapes == graph.shapes
    assert json.dumps(graph_to_dict(read)) == text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"type": "Conv3D"}, "'first': found type 'Conv3D', expected one of .*'Conv'"),
        ({"type": None}, "'first': found type None, expected one of .*'Conv'"),
        ({"type": "Layer"}, "'first': found type 'Layer', expected one of .*'Conv'"),
        ({"type": "GraphError"}, "found type 'GraphError'"),
        ({"colour": 1}, r"'first' \(Conv\): found settings .*'colour'.*, expected .*'features'"),
        ({"groups": ...}, r"'first' \(Conv\): found settings .*, expected .*'groups'"),
        ({"features": 7}, r"'first' \(Conv\): found .*7 output channels"),
        ({"inputs": ["nothing"]}, r"'first' \(Conv\): found unknown inputs \['nothing'\]"),
    ],
)
def test_a_description_that_is_not_understood_is_refused(change, complaint):
    description = json.loads(json.dumps(graph_to_dict(_everything())))
    first = {**description["layers"][0], **change}
    description["layers"][0] = {key: value for key, value in first.items() if value is not ...}
    with pytest.raises(GraphError, match=complaint):
        graph_from_dict(description)
    del description["layers"][0]["type"]
    with pytest.raises(GraphError, match="'first': found type None"):
        graph_from_dict(description)

"""Which layers share an operation, and with how many bits."""

import dataclasses

import pytest

from lrq_jax.graph import INPUT, GraphBuilder
from lrq_jax.graph import layers as L
from lrq_jax.passes import QuantSpec, Student, plan_quantization
from lrq_jax.passes.plan import fixed_tensors, tracked_tensors


def residual():
    """conv1+bn1+relu1, a basic block, pool, classifier."""
    net = GraphBuilder("residual", input_shape=(8, 8, 3))
    x = net.relu(net.batch_norm(net.conv(net.image, 4, 3, name="conv1"), name="bn1"), name="relu1")
    y = net.conv(x, 4, 3, name="block_conv1")
    y = net.relu(net.batch_norm(y, name="block_bn1"), name="block_relu1")
    y = net.batch_norm(net.conv(y, 4, 3, name="block_conv2"), name="block_bn2")
    x = net.relu(net.add(x, y, name="block_add"), name="block_relu2")
    net.dense(net.global_pool(x, name="pool"), 5, name="classifier")
    return net.build()


def summary(graph, **settings):
    """`{output: (layers in the group, weight bits, output bits)}`."""
    operations = plan_quantization(graph, QuantSpec(**settings))
    return {
        op.output: (
            tuple(part.name for part in (op.layer, op.batch_norm, op.activation) if part),
            op.weight_bits,
            op.output_bits,
        )
        for op in operations
    }


def test_a_residual_network_under_policy_u():
    assert summary(residual(), weight_bits=3, act_bits=4) == {
        "relu1": (("conv1", "bn1", "relu1"), 3, 4),
        "block_relu1": (("block_conv1", "block_bn1", "block_relu1"), 3, 4),
        "block_bn2": (("block_conv2", "block_bn2"), 3, 8),  # before an addition
        "block_relu2": (("block_add", "block_relu2"), None, 4),
        "pool": (("pool",), None, 8),  # pooled features
        "classifier": (("classifier",), 3, None),  # float logits
    }


def test_policy_r_keeps_the_edges_wide():
    plan = summary(residual(), weight_bits=2, act_bits=2, policy="R")
    assert {name: bits[1:] for name, bits in plan.items()} == {
        "relu1": (7, 2),
        "block_relu1": (2, 2),
        "block_bn2": (2, 8),
        "block_relu2": (None, 2),
        "pool": (None, 8),
        "classifier": (7, None),
    }
    plan = summary(residual(), weight_bits=2, policy="R", edge_bits=8, boundary_bits=6)
    assert plan["relu1"][1] == plan["classifier"][1] == 8
    assert plan["block_bn2"][2] == plan["pool"][2] == 6
    assert plan["block_relu1"][1] == 2


def convnet(*, hidden, pooled):
    """conv, relu, (max pool,) flatten, (dense, relu,) dense: no pooled features."""
    net = GraphBuilder("convnet", input_shape=(8, 8, 3))
    x = net.relu(net.conv(net.image, 4, 3, name="conv"), name="relu")
    x = net.max_pool(x, 2, name="maxpool") if pooled else x
    x = net.flatten(x, name="flatten")
    x = net.relu(net.dense(x, 6, name="hidden"), name="hidden_relu") if hidden else x
    net.dense(x, 5, name="classifier")
    return net.build()


@pytest.mark.parametrize("pooled", [False, True])
def test_policy_r_widens_the_last_layers_input_wherever_its_codes_are_made(pooled):
    """Codes pass flattening and max pools unchanged: the ReLU before them makes them."""
    plan = summary(convnet(hidden=False, pooled=pooled), policy="R")
    assert plan["relu"] == (("conv", "relu"), 7, 8)
    assert plan["flatten"][2] is None
    plan = summary(convnet(hidden=True, pooled=pooled), policy="R")
    assert plan["relu"] == (("conv", "relu"), 7, 4)
    assert plan["hidden_relu"] == (("hidden", "hidden_relu"), 4, 8)
    plan = summary(convnet(hidden=True, pooled=pooled), policy="U")
    assert plan["hidden_relu"] == (("hidden", "hidden_relu"), 4, 4)


def test_layers_that_move_codes_have_no_bits_and_averages_have():
    net = GraphBuilder("movers", input_shape=(8, 8, 3))
    x = net.relu(net.conv(net.image, 4, 3, name="conv"), name="relu")
    x = net.max_pool(x, 3, strides=1, padding=1, name="maxpool")
    x = net.pad(net.slice(x, step=(2, 2, 1), name="slice"), channels=(0, 1), name="pad")
    x = net.avg_pool(x, 2, name="avgpool")
    x = net.concat(x, x, name="concat")
    net.dense(net.flatten(x, name="flatten"), 5, name="classifier")
    graph = net.build()
    plan = summary(graph)
    assert {name: plan[name][1:] for name in plan} == {
        "relu": (4, 4),
        "maxpool": (None, None),
        "slice": (None, None),
        "pad": (None, None),
        "avgpool": (None, 8),
        "concat": (None, 8),
        "flatten": (None, None),
        "classifier": (4, None),
    }
    assert tracked_tensors(graph, QuantSpec()) == ("relu", "avgpool", "concat")


def test_linear_bottlenecks_are_boundaries():
    net = GraphBuilder("inverted", input_shape=(8, 8, 3))
    x = net.batch_norm(net.conv(net.image, 4, 3, name="conv"), name="bn")
    y = net.relu6(net.batch_norm(net.conv(x, 8, 1, name="expand"), name="bn_e"), name="six_e")
    y = net.conv(y, 8, 3, groups=8, name="depthwise")
    y = net.relu6(net.batch_norm(y, name="bn_d"), name="six_d")
    y = net.batch_norm(net.conv(y, 4, 1, name="project"), name="bn_p")
    net.dense(net.global_pool(net.add(x, y, name="add"), name="pool"), 5, name="classifier")
    assert {name: plan[1:] for name, plan in summary(net.build()).items()} == {
        "bn": (4, 8),
        "six_e": (4, 4),
        "six_d": (4, 4),
        "bn_p": (4, 8),
        "add": (None, 8),
        "pool": (None, 8),
        "classifier": (4, None),
    }


def test_what_is_not_fused():
    """A leaky ReLU, anything behind a tensor with two readers, a batch norm of its own."""
    net = GraphBuilder("apart", input_shape=(8, 8, 3))
    x = net.batch_norm(net.conv(net.image, 4, 3, name="conv1"), name="bn1")
    x = net.activation(x, "leaky_relu", name="leaky")
    x = net.conv(x, 4, 3, name="conv2")
    y = net.relu(net.batch_norm(x, name="bn2"), name="relu2")  # conv2 has two readers
    y = net.batch_norm(net.conv(y, 4, 3, name="conv3"), name="bn3")
    z = net.relu(y, name="relu3")  # bn3 has two readers
    s = net.add(net.add(x, y, name="add1"), z, name="add2")
    r = net.relu(s, name="relu4")  # add2 has two readers
    m = net.relu(net.max_pool(net.add(s, r, name="add3"), 2, name="maxpool"), name="relu5")
    net.dense(net.flatten(net.batch_norm(m, name="bn4"), name="flatten"), 5, name="classifier")
    assert summary(net.build(), weight_bits=3, act_bits=5) == {
        "bn1": (("conv1", "bn1"), 3, 8),
        "leaky": (("leaky",), None, 5),
        "conv2": (("conv2",), 3, 8),
        "relu2": (("bn2", "relu2"), None, 5),
        "bn3": (("conv3", "bn3"), 3, 8),
        "relu3": (("relu3",), None, 5),
        "add1": (("add1",), None, 8),
        "add2": (("add2",), None, 8),
        "relu4": (("relu4",), None, 5),
        "add3": (("add3",), None, 8),
        "maxpool": (("maxpool",), None, None),
        "relu5": (("relu5",), None, 5),
        "bn4": (("bn4",), None, 8),
        "flatten": (("flatten",), None, None),
        "classifier": (("classifier",), 3, None),
    }


def test_every_layer_is_in_one_operation_and_reads_what_an_earlier_one_made():
    for graph in (residual(), convnet(hidden=True, pooled=True)):
        made, grouped = {INPUT}, []
        for op in plan_quantization(graph, QuantSpec()):
            grouped += [p.name for p in (op.layer, op.batch_norm, op.activation) if p]
            assert set(op.inputs) <= made
            made.add(op.output)
        assert sorted(grouped) == sorted(layer.name for layer in graph.layers)
        assert graph.output in made


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_change_what_they_name_and_the_last_match_wins():
    plan = summary(
        residual(),
        overrides=("block_*=w6a5", "block_conv2=w8", "pool=a4", "relu1=a3", "block_relu2=a6"),
    )
    assert {name: bits[1:] for name, bits in plan.items()} == {
        "relu1": (4, 3),  # by the name of the tensor
        "block_relu1": (6, 5),
        "block_bn2": (8, 5),
        "block_relu2": (None, 6),
        "pool": (None, 4),
        "classifier": (4, None),
    }


def test_overrides_also_beat_policy_r():
    plan = summary(residual(), policy="R", overrides=("conv1=w4", "pool=a5", "classifier=w3"))
    assert (plan["relu1"][1], plan["pool"][2], plan["classifier"][1]) == (4, 5, 3)


def test_logits_stay_float_whatever_is_overridden():
    plan = summary(residual(), overrides=("*=w6a6",))
    assert plan["classifier"] == (("classifier",), 6, None)
    assert plan["block_relu2"][1] is None


@pytest.mark.parametrize(
    "entry", ["stage9_*=w4", "block_bn1=a8", "CONV1=w4", f"{INPUT}=a4", "classifier=a4"]
)
def test_overrides_that_change_nothing_are_refused(entry):
    """Logits have no codes; a batch norm inside an operation makes no tensor of its own; names match by case."""
    with pytest.raises(
        ValueError, match=r"overrides: found .* change nothing in 'residual'.*conv1"
    ):
        plan_quantization(residual(), QuantSpec(overrides=("conv1=w6", entry)))


@pytest.mark.parametrize(
    "entry",
    ["conv1", "conv1=", "conv1=4", "conv1=w9", "conv1=a1", "conv1=a4w4", "=w4", "conv1=w4 ",
     "conv1=w44", "conv1==w4"],
)  # fmt: skip
def test_malformed_overrides_are_refused_at_once(entry):
    with pytest.raises(ValueError, match=r"overrides: found .*expected PATTERN=wNaM"):
        QuantSpec(overrides=(entry,))


# --- the specification ---------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["weight_bits", "act_bits", "edge_bits", "boundary_bits"])
@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 4.5, "4", None, True])
def test_impossible_bits_are_refused(field, bits):
    with pytest.raises(ValueError, match=f"{field}: found .*, expected 2 to 8"):
        QuantSpec(**{field: bits})


@pytest.mark.parametrize("bits", range(2, 9))
def test_two_to_eight_bits_are_possible(bits):
    spec = QuantSpec(weight_bits=bits, act_bits=bits, edge_bits=bits, boundary_bits=bits)
    assert spec.weight_bits == bits


@pytest.mark.parametrize(
    ("field", "value"),
    [("policy", "u"), ("policy", ""), ("placement", "int"), ("placement", "Paper")],
)
def test_unknown_choices_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field}: found '{value}', expected one of"):
        QuantSpec(**{field: value})


def test_a_specification_is_hashable_and_frozen():
    spec = QuantSpec(overrides=("conv1=w6",))
    assert hash(spec) == hash(QuantSpec(overrides=("conv1=w6",)))
    assert spec != QuantSpec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.weight_bits = 3
    student = Student(graph=residual(), spec=spec, input_range=(-1.0, 1.0))
    assert hash(student) == hash(dataclasses.replace(student))


def test_tensors_with_ranges_by_placement():
    graph = residual()
    integer, paper = QuantSpec(), QuantSpec(placement="paper")
    assert tracked_tensors(graph, integer) == (
        "relu1", "block_relu1", "block_bn2", "block_relu2", "pool",
    )  # fmt: skip
    assert fixed_tensors(integer) == (INPUT,)
    assert tracked_tensors(graph, paper) == ("relu1", "block_relu1", "block_relu2")
    assert fixed_tensors(paper) == ()


def test_weights_are_where_the_plan_says():
    for op in plan_quantization(residual(), QuantSpec()):
        assert op.has_weights == isinstance(op.layer, L.Conv | L.Dense)
        assert op.has_weights == (op.weight_bits is not None)

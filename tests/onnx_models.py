"""ONNX models written by hand for the tests of the reader, and onnxruntime's answer to them."""

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

FLOAT = onnx.TensorProto.FLOAT


class Model:
    """Collects nodes and constants; `save` writes the model and `run` asks onnxruntime."""

    def __init__(self, shape=("batch", 3, 8, 8), *, opset=17, element=FLOAT, seed=0):
        self.opset, self.element = opset, element
        self.shape = shape
        self.rng = np.random.default_rng(seed)
        self.nodes, self.constants = [], []
        self.outputs = []

    def constant(self, values, dtype=None):
        values = np.asarray(values, dtype or None)
        values = values.astype(np.float32) if values.dtype == np.float64 else values
        self.constants.append(numpy_helper.from_array(values, f"constant{len(self.constants)}"))
        return self.constants[-1].name

    def weights(self, *shape):
        return self.constant(self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) or 1))

    def op(self, kind, *inputs, outputs=1, domain="", **attributes):
        """A node; constants may be given as arrays or numbers, left-out inputs as None."""
        names = [i if isinstance(i, str) else "" if i is None else self.constant(i) for i in inputs]
        made = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        name = f"node{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, names, made, name=name, domain=domain, **attributes)
        )
        return made[0] if outputs == 1 else made

    def conv(self, x, features, channels, kernel=3, *, bias=False, **attributes):
        inputs = [self.weights(features, channels, kernel, kernel)]
        if bias:
            inputs.append(self.weights(features))
        attributes.setdefault("pads", [kernel // 2] * 4)
        return self.op("Conv", x, *inputs, **attributes)

    def batch_norm(self, x, channels, **attributes):
        r = self.rng
        return self.op(
            "BatchNormalization", x, r.uniform(0.5, 1.5, channels), r.normal(size=channels),
            r.normal(size=channels), r.uniform(0.5, 1.5, channels), **attributes,
        )  # fmt: skip

    def head(self, x, features, classes=5):
        """Every value of an image or vector reaches the logits, each in its own way."""
        return self.op("Gemm", self.op("Flatten", x), self.weights(features, classes))

    def proto(self, *outputs, inputs=()):
        values = [helper.make_tensor_value_info("image", self.element, self.shape), *inputs]
        results = [helper.make_tensor_value_info(name, FLOAT, ("n", "classes")) for name in outputs]
        graph = helper.make_graph(self.nodes, "model", values, results, self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = min(model.ir_version, 10)
        return model

    def save(self, path, output):
        onnx.save_model(self.proto(output), path)
        return path


def run(path, images):
    """onnxruntime's output, nothing optimised."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]

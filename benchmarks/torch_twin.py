"""The joint step of preset `lrq` in eager PyTorch, as its line of work writes it.

Same networks, batch, attention, losses, fake quantization (the `paper` placement) and optimisers as
`lrq_jax.training.steps.joint_step`; the noise and labels of its first steps can be given, so that
both must show the same losses. It is meant to be fast PyTorch: fused `batch_norm` and `var_mean`,
optimisers that update all tensors in a few calls, nothing copied to the host. `Twin.compile` puts
both forwards with their losses through `torch.compile`, as its users do; updates stay eager.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrq_jax.graph import INPUT, Graph
from lrq_jax.graph import layers as L
from lrq_jax.method import Method

Params = dict[str, Tensor]


def as_torch(name: str, value: np.ndarray) -> Tensor:
    """An array of ours as a tensor in PyTorch's layout: kernels HWIO to OIHW, dense ones IO to OI."""
    tensor = torch.from_numpy(np.array(value))
    if name.endswith("kernel") and tensor.ndim == 4:
        tensor = tensor.permute(3, 2, 0, 1)
    elif name.endswith("kernel") and tensor.ndim == 2:
        tensor = tensor.t()
    return tensor.contiguous()


# --- networks ------------------------------------------------------------------------------------


class Network:
    """A graph of ours with parameters `LAYER/NAME`, run layer by layer.

    Args:
      graph: ResNets: convolution, batch norm, ReLU, addition, slice, pad, max and global pool, dense.
      params: by `layer/name`.
      weight_bits: fake-quantizes every kernel, per output channel; None: none.
      ranges: of activations, by tensor, with `act_bits`.
    """

    def __init__(self, graph: Graph, params: Params, *, weight_bits: int | None = None,
                 act_bits: int = 4, ranges: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:  # fmt: skip
        self.graph, self.params = graph, params
        self.weight_bits, self.act_bits, self.ranges = weight_bits, act_bits, ranges

    def __call__(self, images: Tensor, taps: list[tuple[str, Tensor]] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Logits `[B, K]` and features `[B, D]`; inputs of the batch norms are added to `taps`."""
        values = {INPUT: images}
        for layer in self.graph.layers:
            x = values[layer.inputs[0]]
            if taps is not None and isinstance(layer, L.BatchNorm):
                taps.append((layer.name, x))
            if isinstance(layer, L.Add):
                values[layer.name] = x + values[layer.inputs[1]]
            else:
                values[layer.name] = self._apply(layer, x)
        return values[self.graph.output], values[self.graph.features]

    def _apply(self, layer: L.Layer, x: Tensor) -> Tensor:
        get = lambda name: self.params.get(f"{layer.name}/{name}")  # noqa: E731
        if isinstance(layer, L.Conv):
            return F.conv2d(x, self._kernel(get("kernel")), get("bias"), layer.strides,
                            (layer.padding[0][0], layer.padding[1][0]), layer.dilation, layer.groups)  # fmt: skip
        if isinstance(layer, L.Dense):
            return F.linear(x, self._kernel(get("kernel")), get("bias"))
        if isinstance(layer, L.BatchNorm):
            return F.batch_norm(
                x, get("mean"), get("var"), get("scale"), get("bias"), eps=layer.eps
            )
        if isinstance(layer, L.Activation):
            x = F.relu(x)
            return (
                x if self.ranges is None else fake_quant(x, *self.ranges[layer.name], self.act_bits)
            )
        if isinstance(layer, L.Slice):
            rows, columns, _ = layer.slices
            return x[:, :, rows, columns]
        if isinstance(layer, L.Pad):
            return F.pad(x, (0, 0, 0, 0, *layer.channels))
        if isinstance(layer, L.MaxPool):
            return F.max_pool2d(x, layer.window, layer.strides, layer.padding[0][0])
        if isinstance(layer, L.GlobalPool):
            return x.mean((2, 3))
        raise NotImplementedError(f"no twin of a layer of type {type(layer).__name__}")

    def _kernel(self, kernel: Tensor) -> Tensor:
        if self.weight_bits is None:
            return kernel
        flat = kernel.detach().flatten(1)
        shape = (-1, *(1,) * (kernel.ndim - 1))
        low, high = flat.amin(1).view(shape), flat.amax(1).view(shape)
        return fake_quant(kernel, low, high, self.weight_bits)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
        half = 2 ** (bits - 1)
        scale = (2**bits - 1) / (high - low).clamp(min=1e-8)
        offset = (scale * low).round() + half
        return ((x * scale - offset).round_().clamp_(-half, half - 1) + offset) / scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def fake_quant(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The lineage's quantize-dequantize with a straight-through gradient."""
    return _FakeQuant.apply(x, low, high, bits)


# --- generator -----------------------------------------------------------------------------------


def _conv(params: Params, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, params[f"{name}/kernel"], params[f"{name}/bias"], **options)


def _norm(params: Params, name: str, x: Tensor, labels: Tensor, eps: float) -> Tensor:
    scale, bias = params[f"{name}/affine/scale"], params[f"{name}/affine/bias"]
    if scale.ndim == 1:
        return F.batch_norm(x, None, None, scale, bias, training=True, eps=eps)
    x = F.batch_norm(x, None, None, training=True, eps=eps)
    return x * scale[labels][:, :, None, None] + bias[labels][:, :, None, None]


def _attention(params: Params, x: Tensor) -> Tensor:
    channels = x.shape[1]
    y = F.gelu(_conv(params, "attention/expand", x))
    z = _conv(params, "attention/local", y, padding=2, groups=channels)
    z = _conv(params, "attention/dilated", z, padding=9, dilation=3, groups=channels)
    return x + _conv(params, "attention/project", y * _conv(params, "attention/mix", z))


def generate(params: Params, noise: Tensor, labels: Tensor, *, image_shape: tuple[int, int, int],
             attention: str, layout: torch.memory_format) -> Tensor:  # fmt: skip
    """Images `[B, C, H, W]`; parameters under our generator's names."""
    hidden = noise * params["embedding"][labels] if "embedding" in params else noise
    x = F.linear(hidden, params["dense/kernel"], params["dense/bias"])
    # Our dense layer fills [H, W, C].
    grid = (-(-image_shape[0] // 4), -(-image_shape[1] // 4))
    x = x.view(len(x), *grid, -1).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    x = F.interpolate(_norm(params, "norm0", x, labels, 1e-5), scale_factor=2)
    if attention in ("before_block1", "replace_block1"):
        x = _attention(params, x)
    if attention != "replace_block1":
        x = _conv(params, "block1/conv", x, padding=1)
        x = F.leaky_relu(_norm(params, "norm1", x, labels, 0.8), 0.2)
    if attention == "after_block1":
        x = _attention(params, x)
    x = _conv(params, "block2/conv", F.interpolate(x, scale_factor=2), padding=1)
    x = F.leaky_relu(_norm(params, "norm2", x, labels, 0.8), 0.2)
    x = _conv(params, "to_image/conv", x, padding=1)
    x = torch.tanh(x[:, :, : image_shape[0], : image_shape[1]])
    return F.batch_norm(x, None, None, training=True, eps=1e-5)


# --- losses --------------------------------------------------------------------------------------


def decoupled_distillation(student: Tensor, teacher: Tensor, labels: Tensor, method: Method) -> Tensor:  # fmt: skip
    """DKD; see `lrq_jax.losses.decoupled_distillation`."""
    t = method.temperature
    student, teacher = student / t, teacher / t
    target = F.one_hot(labels, student.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        others = logits.masked_fill(target, -1e9)
        everything = logits.logsumexp(1)
        log_target = logits.gather(1, labels[:, None])[:, 0] - everything
        binary = torch.stack([log_target, others.logsumexp(1) - everything], 1)
        return binary, F.log_softmax(others, 1)

    (p, p_others), (q, q_others) = parts(teacher), parts(student)
    binary = F.kl_div(q, p, reduction="batchmean", log_target=True)
    others = (p_others.exp() * (p_others - q_others)).masked_fill(target, 0).sum(1).mean()
    return t**2 * (method.distill_weight * binary + method.dkd_beta * others)


def margin_loss(features: Tensor, labels: Tensor, sums: Tensor, counts: Tensor, method: Method) -> Tensor:  # fmt: skip
    """AMA against running class means; see `lrq_jax.losses.margin`."""
    centers = sums / counts.clamp(min=1)[:, None]
    mask = (counts[labels] > 0).float()
    cosine = F.cosine_similarity(features, centers[labels], dim=1, eps=1e-6)
    sine = (1 - cosine.square()).clamp(min=1e-7).sqrt()
    distance = 1 - (cosine * math.cos(method.ama_margin) - sine * math.sin(method.ama_margin))
    count = mask.sum().clamp(min=1)
    low = (mask * F.relu(method.ama_lower - distance)).sum() / count
    return low + (mask * F.relu(distance - method.ama_upper)).sum() / count


# --- the step ------------------------------------------------------------------------------------


class Twin:
    """State and steps.

    Args:
      graph: the network.
      method: of preset `lrq`: generator images, DKD, SGD; learning rates as at the first step.
      arrays: our first state: `teacher/LAYER/NAME`, `generator/...`, `range/TENSOR`, and
        `centers/sums`, `centers/counts` of the classes' features.
      bits: of weights and activations.
      layout: of feature maps and kernels.
      device: where it runs.
    """

    def __init__(self, graph: Graph, method: Method, arrays: Mapping[str, np.ndarray], *, bits: int,
                 layout: torch.memory_format = torch.contiguous_format, device: str = "cpu") -> None:  # fmt: skip
        self.graph, self.method, self.layout, self.device = graph, method, layout, device

        def tensors(group: str) -> Params:
            return {
                name.removeprefix(f"{group}/"): self._placed(as_torch(name, value))
                for name, value in arrays.items()
                if name.startswith(f"{group}/")
            }

        constants = tensors("teacher")
        self.teacher = Network(graph, constants)
        moments = ("mean", "var")
        weights = {n: v for n, v in constants.items() if n.rpartition("/")[2] not in moments}
        weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
        ranges = {name: (ends[0], ends[1]) for name, ends in tensors("range").items()}
        self.student = Network(
            graph, {**constants, **weights}, weight_bits=bits, act_bits=bits, ranges=ranges
        )
        self.generator = {name: v.requires_grad_() for name, v in tensors("generator").items()}
        centers = tensors("centers")
        self.sums, self.counts = centers["sums"], centers["counts"]
        self.adam = torch.optim.Adam(
            self.generator.values(), method.generator_learning_rate,
            betas=(method.generator_beta1, 0.999), eps=method.adam_epsilon,
        )  # fmt: skip
        self.sgd = torch.optim.SGD(
            weights.values(), method.student_learning_rate, momentum=method.student_momentum,
            weight_decay=method.student_weight_decay, nesterov=True,
        )  # fmt: skip
        self._given: list[tuple[Tensor, Tensor]] = []
        self._generator_losses, self._student_losses = self.generator_losses, self.student_losses

    def _placed(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.contiguous(memory_format=self.layout)
        return x.to(self.device)

    def give(self, noise: np.ndarray, labels: np.ndarray) -> None:
        """What the next step shall draw."""
        pair = (torch.from_numpy(np.array(noise)), torch.from_numpy(np.array(labels)).long())
        self._given.append(tuple(x.to(self.device) for x in pair))

    def _latents(self) -> tuple[Tensor, Tensor]:
        if self._given:
            return self._given.pop(0)
        batch = self.method.batch_size
        noise = torch.randn(batch, self.method.latent_dim, device=self.device)
        return noise, torch.randint(self.graph.num_classes, (batch,), device=self.device)

    def images(self) -> tuple[Tensor, Tensor]:
        """Fresh images and their labels."""
        noise, labels = self._latents()
        return self._generate(noise, labels), labels

    def _generate(self, noise: Tensor, labels: Tensor) -> Tensor:
        return generate(
            self.generator, noise, labels, image_shape=self.graph.input_shape,
            attention=self.method.attention, layout=self.layout,
        )  # fmt: skip

    def teach(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's logits, features and batch-norm-statistics loss."""
        taps: list[tuple[str, Tensor]] = []
        logits, features = self.teacher(images, taps)
        bns = images.new_zeros(())
        for name, x in taps:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            params = self.teacher.params
            bns = (
                bns
                + F.mse_loss(mean, params[f"{name}/mean"])
                + F.mse_loss(var, params[f"{name}/var"])
            )
        return logits, features, bns / len(taps)

    def generator_losses(self, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """Images, the teacher's logits and features of them, and what the generator minimises."""
        method = self.method
        images = self._generate(noise, labels)
        logits, features, bns = self.teach(images)
        terms = {"generator/ce": F.cross_entropy(logits, labels), "generator/bns": bns}
        if method.ama_weight:
            terms["generator/ama"] = margin_loss(features, labels, self.sums, self.counts, method)
        return images, logits, features, self._with_sum(terms, "generator")

    def student_losses(self, images: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:  # fmt: skip
        """What the student minimises."""
        logits, _ = self.student(images)
        distill = decoupled_distillation(logits, teacher_logits, labels, self.method)
        terms = {"student/ce": F.cross_entropy(logits, labels), "student/distill": distill}
        return self._with_sum(terms, "student")

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms that `generator/loss` and `student/loss` sum; those not summed left out."""
        method = self.method
        weights = {
            "generator/ce": method.class_weight,
            "generator/bns": method.bns_weight,
            "generator/ama": method.ama_weight,
            "student/ce": method.ce_weight,
            "student/distill": 1.0,  # its parts have theirs
        }
        return {name: weight for name, weight in weights.items() if weight}

    def _with_sum(self, terms: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        weights = self.weights
        first, *others = (weights[name] * terms[name] for name in terms if name in weights)
        return {**terms, f"{part}/loss": sum(others, first)}

    def compile(self, **options: Any) -> None:
        """From now on both forwards with their losses are compiled, and with them their gradients;
        `backward()` itself, clipping and the optimisers' steps stay as they are.

        Args:
          **options: of `torch.compile`.
        """
        self._generator_losses = torch.compile(self.generator_losses, **options)
        self._student_losses = torch.compile(self.student_losses, **options)

    def generator_step(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Updates the generator; images, labels and the teacher's logits for the student."""
        noise, labels = self._latents()
        images, logits, features, terms = self._generator_losses(noise, labels)
        self._update(self.adam, self.generator, terms["generator/loss"])
        with torch.no_grad():
            self.sums.index_add_(0, labels, features)
            self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float32))
        return images.detach(), labels, logits.detach(), terms

    def joint_step(self) -> dict[str, Tensor]:
        """Updates generator and student."""
        images, labels, teacher_logits, terms = self.generator_step()
        terms = {**terms, **self._student_losses(images, labels, teacher_logits)}
        trained = {n: v for n, v in self.student.params.items() if v.requires_grad}
        self._update(self.sgd, trained, terms["student/loss"])
        return {name: value.detach() for name, value in terms.items()}

    def _update(self, optimizer: torch.optim.Optimizer, params: Params, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), self.method.gradient_clip)
        optimizer.step()

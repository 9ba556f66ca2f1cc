"""One side of `joint_step.py`: holds a training step, runs a part of it for each line it reads.

    python benchmarks/joint_worker.py {ours,torch,compiled} CASE EXCHANGE

CASE is JSON, the fields of `Case`. First a line of JSON comes out that describes the side, then, for
each line of input with the name of a part, the seconds and processor seconds it took; at the end of
input the memory.
`ours` writes its first state, draws and losses to the file EXCHANGE, `torch` and `compiled` (the
same through `torch.compile`) start from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MATMUL_SIDE = {"cpu": 2048, "gpu": 8192}
"""Of the square matrices whose product shows a peak: tens of milliseconds, beside which a launch and
its waiting do not count."""
CHECKED_STEPS = 2
"""Steps both sides make on the same noise: the second one's losses show the first one's updates."""
FEW = 8
"""Images that a random teacher's statistics, ranges and centres of classes come from."""
PARTS = ("images", "teacher", "generator", "joint")
"""The generator's forward; the teacher's, with statistics; a step that updates the generator alone;
the whole step. Each contains the ones before it but `teacher`, which has images at hand."""
STEPS = ("generator", "joint")
"""The parts that are steps: a call makes as many as the case says, and waits for the last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed.

    Attributes:
      network: name in the registry; weights are random.
      batch: images a step.
      attention: of the generator, `none` or a place.
      placement: of our student's quantizers; the twin's are always the `paper` ones.
      bits: of weights and activations.
      precision: as the config's field of this name.
      layout: of the twin's maps and kernels; empty: that which is faster for it.
      compiled: a third side is the twin through `torch.compile`.
      steps: of training between two waits for the device, as the loop makes them.
      calls: of so many steps that a side makes when it is its turn, as training makes them: memory
        that lay free in between can be slow to get back, from a virtual machine's host above all.
    """

    network: str
    batch: int
    attention: str
    placement: str = "paper"
    bits: int = 4
    precision: str = "float32"
    layout: str = ""
    compiled: bool = False
    steps: int = 1
    calls: int = 1

    @property
    def name(self) -> str:
        """For tables."""
        attention = "no attention" if self.attention == "none" else self.attention
        return f"{self.network}, batch {self.batch}, {attention}, {self.placement}"


Side = tuple[dict[str, Any], dict[str, Callable[[], Any]], Callable[[], int]]
"""What it is, its parts, and how to ask for the most bytes that its device held: of a CPU those of
the process, of a GPU those of the framework's allocator (ours: compiling included)."""


def run_settings(case: Case) -> tuple[Any, Any]:
    """The network and the settings of a run, preset `lrq` for its image size."""
    from lrq_jax.config import base_config, resolve
    from lrq_jax.networks import build_network

    graph = build_network(case.network)
    config = base_config()
    config.method.preset = "lrq"
    config.method.batch_size, config.method.attention = case.batch, case.attention
    config.student.placement, config.precision = case.placement, case.precision
    config.student.weight_bits = config.student.act_bits = case.bits
    return graph, resolve(config, image_size=graph.input_shape[0])


# --- ours ----------------------------------------------------------------------------------------


def our_side(case: Case, exchange: Path) -> Side:
    """Compiled parts of our step."""
    import jax
    import jax.numpy as jnp
    from subjects import random_variables

    from lrq_jax.data import Preprocessing
    from lrq_jax.quantize import step_spec
    from lrq_jax.readers import Teacher
    from lrq_jax.sharding import data_mesh
    from lrq_jax.synthesis.generator import generate
    from lrq_jax.training import steps
    from lrq_jax.training.comparison import teacher_forward
    from lrq_jax.training.compilation import compile_step, put_replicated

    graph, settings = run_settings(case)
    jax.config.update("jax_default_matmul_precision", settings.resources.matmul_precision)
    few = jax.random.normal(jax.random.key(1), (FEW, *graph.input_shape))
    teacher = Teacher(
        graph=graph,
        variables=random_variables(graph, few),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=graph.input_shape[0]),
        arch=case.network,
    )
    mesh = data_mesh(1)
    spec = step_spec(teacher, settings, mesh)
    variables = put_replicated(teacher.variables, mesh)
    start = jax.jit(steps.initial_state, static_argnums=(0, 2))
    state = start(spec, teacher.variables, 0)
    state = put_replicated(calibrated(state, teacher, few), mesh)
    jax.block_until_ready(state)

    clock = time.monotonic()
    programs = {
        name: compile_step(function, state, variables, mesh=mesh, spec=spec, count=case.steps)
        for name, function in (("joint", steps.joint_step), ("generator", steps.warmup_step))
    }
    seconds = time.monotonic() - clock
    states = {"joint": state, "generator": jax.tree.map(jnp.copy, state)}
    states["joint"] = _record_first_steps(
        exchange, spec, teacher, programs["joint"], state, variables
    )

    key = jax.random.key(5)
    noise, labels = jax.jit(lambda key: steps.draw_latents(key, spec))(key)
    images_of = jax.jit(lambda params: generate(spec.generator, params, noise, labels))
    teach = jax.jit(lambda v, images: teacher_forward(graph, v, images, resources=spec.resources))
    held = jax.block_until_ready(images_of(states["generator"].generator))
    jax.block_until_ready(teach(variables, held))

    def step(name: str) -> None:
        states[name], metrics = programs[name](states[name], variables)
        jax.block_until_ready((states[name], metrics))

    parts = {
        "images": lambda: jax.block_until_ready(images_of(states["generator"].generator)),
        "teacher": lambda: jax.block_until_ready(teach(variables, held)),
        "generator": lambda: step("generator"),
        "joint": lambda: step("joint"),
    }
    on_cpu = jax.default_backend() == "cpu"
    size = MATMUL_SIDE["cpu" if on_cpu else "gpu"]
    side = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    memory = programs["joint"].memory_analysis()
    description = {
        "versions": {"jax": jax.__version__},
        "device": f"{jax.devices()[0].device_kind}, {jax.default_backend()}",
        "compile_seconds": seconds,
        "flops": counted_flops(
            functools.partial(steps.joint_step, spec=spec),
            states["joint"],
            variables,
            platform=jax.default_backend(),
        ),
        "matmul_flops": _matmul(lambda: jax.block_until_ready(product(side, side)), size),
        "program_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    }
    if on_cpu:
        return description, parts, _peak_of_process
    return description, parts, lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def counted_flops(step: Callable[..., Any], *arguments: Any, platform: str) -> float | None:
    """Floating-point operations of a step as it is written for the platform, before XLA optimises
    it: what it puts into calls of cuDNN it no longer counts. Elementwise operations are in it.
    None where the backend counts nothing before it compiles, as plugins for GPUs do."""
    import jax

    from lrq_jax.ops.by_platform import tracing_for

    with tracing_for(platform):
        counted = jax.jit(step).lower(*arguments).cost_analysis()
    return counted["flops"] if counted else None


def calibrated(state: Any, teacher: Any, images: Any) -> Any:
    """The state with ranges of activations, those of the teacher on some images, and with a centre
    for each class: features of the images in turn, so that no class has none."""
    import jax
    import jax.numpy as jnp

    from lrq_jax.losses import update_centers
    from lrq_jax.passes import float_forward

    graph, quant = teacher.graph, state.student["quant"]
    names = tuple(name for name in quant["activations"] if name in graph.by_name)

    def found(variables: Any, images: Any) -> Any:
        values = float_forward(graph, variables, images, (*names, graph.features))
        return {n: {"low": values[n].min(), "high": values[n].max()} for n in names}, values[
            graph.features
        ]

    ends, features = jax.jit(found)(teacher.variables, images)
    labels = jnp.arange(graph.num_classes)
    ranges = {**quant["activations"], **ends}
    return state._replace(
        student={**state.student, "quant": {**quant, "activations": ranges}},
        centers=update_centers(state.centers, features[labels % len(features)], labels),
    )


def _record_first_steps(exchange: Path, spec: Any, teacher: Any, program: Any, state: Any,
                        variables: Any) -> Any:  # fmt: skip
    """Makes the first steps; writes what they started from, drew and lost."""
    import jax

    from lrq_jax.training import steps

    def flat(group: str, tree: Any) -> dict[str, np.ndarray]:
        return {
            "/".join([group, *(key.key for key in path)]): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    arrays = flat("generator", state.generator)
    arrays |= {f"centers/{n}": np.asarray(x) for n, x in state.centers._asdict().items()}
    for collection in teacher.variables.values():
        arrays |= flat("teacher", collection)
    for name, ends in state.student["quant"]["activations"].items():
        arrays[f"range/{name}"] = np.asarray([ends["low"], ends["high"]])
    draws = dataclasses.replace(spec, mesh=None)
    key, first, done = jax.random.wrap_key_data(np.asarray(state.key)), int(state.step), 0
    while done < CHECKED_STEPS:
        state, metrics = program(state, variables)
        for losses in zip(*metrics.values(), strict=True):
            drawn = steps.draw_latents(jax.random.fold_in(key, first + done), draws)
            arrays[f"noise/{done}"], arrays[f"labels/{done}"] = (np.asarray(x) for x in drawn)
            arrays |= {f"loss/{done}/{n}": np.asarray(v) for n, v in zip(metrics, losses, strict=True)}  # fmt: skip
            done += 1
    np.savez(exchange, **arrays)
    return state


# --- the twin ------------------------------------------------------------------------------------


def torch_flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and matrix products that torch executes, forward and
    backward. Its own counter takes the kernel gradient of a grouped convolution for a dense one's."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def backward(grad: list[int], x: list[int], kernel: list[int], *rest: Any, **_: Any) -> int:
        transposed, (to_x, to_kernel, _) = rest[4], rest[7]
        pixels = math.prod((x if transposed else grad)[2:])
        return 2 * grad[0] * pixels * math.prod(kernel) * (to_x + to_kernel)

    mapping = {torch.ops.aten.convolution_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def torch_side(case: Case, exchange: Path, *, compiled: bool = False) -> Side:
    """Parts of the twin: eager, in the memory layout that is faster for it; or compiled, of which
    there are whole steps alone."""
    import torch
    from torch_twin import Twin

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = case.precision != "float32"
    torch.backends.cudnn.allow_tf32 = case.precision != "float32"
    torch.backends.cudnn.benchmark = True
    graph, settings = run_settings(case)
    with np.load(exchange) as stored:
        arrays = dict(stored)

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def make(layout: str) -> Twin:
        return Twin(graph, settings.method, arrays, bits=case.bits, layout=getattr(torch, layout),
                    device=device)  # fmt: skip

    seconds = {}
    for layout in () if case.layout else ("contiguous_format", "channels_last"):
        twin = make(layout)
        for _ in range(2):
            clock = time.monotonic()
            twin.joint_step()
            finish()
            seconds[layout] = time.monotonic() - clock
    layout = case.layout or min(seconds, key=seconds.__getitem__)
    twin = make(layout)
    if compiled:
        twin.compile()
    compared, clock, compile_seconds = [], time.monotonic(), 0.0
    for number in range(CHECKED_STEPS):
        twin.give(arrays[f"noise/{number}"], arrays[f"labels/{number}"])
        found = {name: float(value) for name, value in twin.joint_step().items()}
        ours = {name: float(arrays[f"loss/{number}/{name}"]) for name in found}
        compared.append({name: (ours[name], value) for name, value in found.items()})
        if compiled and not number:
            compile_seconds = time.monotonic() - clock
    flops = None
    if not compiled:
        flops = torch_flops(twin.joint_step)
    run = {"joint": twin.joint_step, "generator": twin.generator_step}
    parts: dict[str, Callable[[], Any]] = {
        name: lambda name=name: [run[name]() for _ in range(case.steps)] for name in STEPS
    }
    if not compiled:
        held, _ = twin.images()

        def without_gradient(function: Callable[..., Any], *arguments: Any) -> None:
            with torch.no_grad():
                function(*arguments)

        parts["images"] = lambda: without_gradient(twin.images)
        parts["teacher"] = lambda: without_gradient(twin.teach, held.detach())
    size = MATMUL_SIDE["cpu" if device == "cpu" else "gpu"]
    side = torch.ones(size, size, device=device)

    def product() -> None:
        side @ side
        finish()

    description = {
        "versions": {"torch": torch.__version__},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "compile_seconds": compile_seconds,
        "flops": flops,
        "matmul_flops": _matmul(product, size),
        "layout": layout,
        "seconds_by_layout": {key: round(value, 4) for key, value in seconds.items()},
        "losses": compared,
        "weights_of_losses": twin.weights,
    }
    waited = {name: lambda part=part: (part(), finish()) for name, part in parts.items()}
    if device == "cpu":
        return description, waited, _peak_of_process
    torch.cuda.reset_peak_memory_stats()
    return description, waited, torch.cuda.max_memory_allocated


# --- both ----------------------------------------------------------------------------------------


def _matmul(product: Callable[[], Any], size: int) -> float:
    """FLOP/s of the fastest of some products of square float32 matrices of this size."""
    best = float("inf")
    for _ in range(8):
        clock = time.monotonic()
        product()
        best = min(best, time.monotonic() - clock)
    return 2 * size**3 / best


def _peak_of_process() -> int:
    """Most bytes this process held since `clear_refs` was written to, on Linux; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def main() -> None:
    """Serves one side."""
    side, text, exchange = sys.argv[1:]
    make = {
        "ours": our_side,
        "torch": torch_side,
        "compiled": functools.partial(torch_side, compiled=True),
    }[side]
    case = Case(**json.loads(text))
    description, parts, peak_bytes = make(case, Path(exchange))
    with contextlib.suppress(OSError):  # compiling has a peak of its own; count from here
        Path("/proc/self/clear_refs").write_text("5")
    print(json.dumps(description), flush=True)
    for line in sys.stdin:
        part = line.strip()
        calls, steps = (case.calls, case.steps) if part in STEPS else (1, 1)
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            parts[part]()
        seconds = time.perf_counter() - clock, time.process_time() - processor
        print(json.dumps([second / (calls * steps) for second in seconds]), flush=True)
    print(json.dumps({"peak_bytes": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()

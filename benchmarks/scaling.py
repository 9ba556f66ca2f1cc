"""What the joint step sends between devices, and how time and memory grow with batch and pixels.

    python benchmarks/scaling.py collectives --network resnet20_cifar --batch 200 --devices 8
    python benchmarks/scaling.py growth --out results/growth.jsonl
    python benchmarks/scaling.py growth --repeats 0 --network resnet50 --side 224 --batches 8 16 --sides

`collectives` compiles the step for simulated devices and counts what its program sends: simulated
devices share one processor, so their speed says nothing, but the program is the one that real ones
would run. `growth` times the step, and asks the compiler for its memory, at four batch sizes and at
four image sizes; without repeats it only compiles. Each result is a line of JSON with machine, load,
date and commit.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import provenance, report

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def count_collectives(program: str) -> dict[str, tuple[int, int]]:
    """`{collective: (operations, bytes of their results)}` in the text of a compiled program."""
    number: Counter[str] = Counter()
    size: Counter[str] = Counter()
    pattern = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
    for match in pattern.finditer(program):
        number[match[2]] += 1
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
            if kind in BYTES:
                size[match[2]] += BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
    return {kind: (number[kind], size[kind]) for kind in number}


def compiled_step(network: str, batch: int, devices: int, side: int | None = None,
                  resources: tuple[str, str] = ("float32", "none")) -> tuple[Any, ...]:  # fmt: skip
    """The joint step of preset `lrq` with random weights: program, its first state, variables.
    `resources`: precision and rematerialisation, as the config's fields."""
    import jax
    from joint_worker import FEW
    from subjects import random_variables

    from lrq_jax.config import base_config, resolve
    from lrq_jax.data import Preprocessing
    from lrq_jax.networks import build_network
    from lrq_jax.quantize import step_spec
    from lrq_jax.readers import Teacher
    from lrq_jax.sharding import data_mesh
    from lrq_jax.training import steps
    from lrq_jax.training.compilation import compile_step, put_replicated

    settings = {"input_shape": (side, side, 3)} if side else {}
    graph = build_network(network, **settings)
    images = jax.random.normal(jax.random.key(1), (FEW, *graph.input_shape))
    config = base_config()
    config.method.preset, config.method.batch_size = "lrq", batch
    config.precision, config.rematerialize = resources
    teacher = Teacher(
        graph=graph,
        variables=random_variables(graph, images),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=graph.input_shape[0]),
        arch=network,
    )
    mesh = data_mesh(devices)
    spec = step_spec(teacher, resolve(config, image_size=graph.input_shape[0]), mesh)
    variables = put_replicated(teacher.variables, mesh)
    start = jax.jit(steps.initial_state, static_argnums=(0, 2))
    state = put_replicated(start(spec, teacher.variables, 0), mesh)
    program = compile_step(steps.joint_step, state, variables, mesh=mesh, spec=spec)
    return program, state, variables


def collectives(options: argparse.Namespace) -> dict[str, Any]:
    """Counts for one network, batch and number of devices."""
    program, *_ = compiled_step(options.network, options.batch, options.devices, options.side)
    found = count_collectives(program.as_text())
    return {
        "network": options.network,
        "batch": options.batch,
        "devices": options.devices,
        "collectives": {k: {"operations": n, "bytes": b} for k, (n, b) in found.items()},
        "flops_per_device": program.cost_analysis()["flops"],
    }


def growth_point(network: str, batch: int, side: int | None, repeats: int,
                 resources: tuple[str, str]) -> dict[str, Any]:  # fmt: skip
    """Seconds of a step (median, none without repeats) and the bytes its program holds, as its
    compiler counts them; where the device counts too, the most it held so far in this process."""
    import jax

    program, state, variables = compiled_step(network, batch, 1, side, resources)
    memory = program.memory_analysis()
    seconds = []
    for _ in range(repeats + 1 if repeats else 0):
        clock = time.perf_counter()
        state, metrics = program(state, variables)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - clock)
    return {
        "network": network,
        "batch": batch,
        "side": side,
        "precision": resources[0],
        "rematerialize": resources[1],
        "seconds": round(statistics.median(seconds[1:]), 4) if repeats else None,
        "seconds_min": round(min(seconds[1:]), 4) if repeats else None,
        "state_bytes": memory.argument_size_in_bytes,
        "working_bytes": memory.temp_size_in_bytes,
        "device": jax.devices()[0].device_kind,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("collectives", "growth"))
    parser.add_argument("--network", default="resnet20_cifar")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--side", type=int, help="pixels; default: the network's own")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="*", default=(16, 32, 64, 128))
    parser.add_argument("--sides", type=int, nargs="*", default=(16, 32, 48, 64))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rematerialize", default="none")
    parser.add_argument("--out", type=Path, help="a line of JSON is appended for each result")
    return parser


def main() -> None:
    """See the module docstring."""
    options = _parser().parse_args()
    if options.what == "collectives":
        flag = f"--xla_force_host_platform_device_count={options.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        points = [lambda: collectives(options)]
    else:
        cells = [(n, options.side or 32) for n in options.batches]
        cells += [(32, n) for n in options.sides]
        resources = options.precision, options.rematerialize
        points = [
            lambda batch=batch, side=side: growth_point(
                options.network, batch, side, options.repeats, resources
            )
            for batch, side in dict.fromkeys(cells)
        ]
    for point in points:
        about = provenance()
        report({**point(), **about}, options.out)


if __name__ == "__main__":
    main()

"""Converts a published checkpoint (PyTorch, safetensors, NumPy, Keras, Flax) into a teacher.

    python scripts/convert_teacher.py --source resnet20.th --out teachers/resnet20

The architecture, the number of classes and the normalisation are found from the file's names and
shapes where they decide them; the options say them where they do not.
"""

from __future__ import annotations

import argparse
import sys

from lrq_jax.networks import list_networks
from lrq_jax.readers import convert_teacher, describe, save_teacher


class _List(argparse.Action):
    """Prints the known networks and ends, whatever else is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(list_networks())
        parser.exit()


_MAX_LINES = 24
"""Lines of an error that fit one screen."""


def _triple(text: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in text.split(","))
    except ValueError:
        message = f"found {text!r}, expected three numbers such as 0.485,0.456,0.406"
        raise argparse.ArgumentTypeError(message) from None
    return red, green, blue


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        required=True,
        help="a .pt, .pth, .th, .safetensors, .npz, .h5, .keras or .msgpack file, or the directory "
        "of an orbax checkpoint",
    )
    parser.add_argument("--out", required=True, help="teacher directory to write")
    parser.add_argument("--arch", help="a network of --list; default: found in the file")
    parser.add_argument("--list", action=_List, nargs=0, help="print the known networks and end")
    parser.add_argument("--num-classes", type=int, help="checked against the file")
    parser.add_argument("--mean", type=_triple, help="R,G,B of pixels scaled to [0, 1]")
    parser.add_argument("--std", type=_triple, help="R,G,B of pixels scaled to [0, 1]")
    parser.add_argument("--size", type=int, help="side of the square input in pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace the teacher at --out")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the conversion; returns 0, or 2 after a message on standard error."""
    options = _parser().parse_args(arguments)
    try:
        teacher = convert_teacher(
            options.source,
            options.arch,
            num_classes=options.num_classes,
            mean=options.mean,
            std=options.std,
            size=options.size,
        )
        save_teacher(teacher, options.out, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        lines = str(error).splitlines()
        print("\n".join(["convert_teacher: error:", *lines[:_MAX_LINES]]), file=sys.stderr)
        if len(lines) > _MAX_LINES:
            print(f"  ... and {len(lines) - _MAX_LINES} more lines", file=sys.stderr)
        return 2
    print(describe(teacher))
    print(f"{'written to':<13}{options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Converts a published checkpoint (PyTorch, safetensors, NumPy, Keras, Flax, ONNX) into a teacher.

    python scripts/convert_teacher.py --source resnet20.th --out teachers/resnet20

The architecture, the number of classes and the normalisation are found from the file's names and
shapes where they decide them; the options say them where they do not.
"""

from __future__ import annotations

import argparse
import sys

from lrq_jax.networks import list_networks
from lrq_jax.readers import convert_teacher, describe, save_teacher
from lrq_jax.readers.onnx_graph import ASSUMPTIONS


class _List(argparse.Action):
    """Prints the known networks and ends, whatever else is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(list_networks())
        parser.exit()


_MAX_LINES = 24
"""Lines of an error that fit one screen; elsewhere than on a terminal all are written."""


def _channels(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3):
        message = f"found {text!r}, expected three numbers such as 0.485,0.456,0.406, or one (grey)"
        raise argparse.ArgumentTypeError(message)
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        required=True,
        help="a .pt, .pth, .th, .safetensors, .npz, .h5, .keras, .msgpack or .onnx file, or the "
        "directory of an orbax checkpoint",
    )
    parser.add_argument("--out", required=True, help="teacher directory to write")
    parser.add_argument("--arch", help="a network of --list; default: found in the file")
    parser.add_argument("--list", action=_List, nargs=0, help="print the known networks and end")
    parser.add_argument("--num-classes", type=int, help="checked against the file")
    parser.add_argument("--mean", type=_channels, help="R,G,B of pixels scaled to [0, 1]")
    parser.add_argument("--std", type=_channels, help="R,G,B of pixels scaled to [0, 1]")
    parser.add_argument("--size", type=int, help="side of the square input in pixels")
    parser.add_argument("--resize", type=int, help="shorter side before the centre crop, pixels")
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="of the resize")
    parser.add_argument("--bn-eps", type=float, help="eps of every batch norm, where not published")
    parser.add_argument(
        "--assume-bn", choices=ASSUMPTIONS,
        help="take an .onnx file without batch norms, for data-free rounding only",
    )  # fmt: skip
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
            resize=options.resize,
            interpolation=options.interpolation,
            bn_eps=options.bn_eps,
            assume_bn=options.assume_bn,
        )
        save_teacher(teacher, options.out, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        lines = str(error).splitlines()
        shown = _MAX_LINES if sys.stderr.isatty() else len(lines)
        print("\n".join(["convert_teacher: error:", *lines[:shown]]), file=sys.stderr)
        if len(lines) > shown:
            print(f"  ... and {len(lines) - shown} more lines; 2> FILE has them", file=sys.stderr)
        return 2
    print(describe(teacher))
    print(f"{'written to':<13}{options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What may be set and chosen, read from the code itself: for `--help`, `--list` and the docs."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable

from lrq_jax.config import RunSettings, base_config, field_names
from lrq_jax.method import Method
from lrq_jax.networks import list_networks
from lrq_jax.passes import QuantSpec
from lrq_jax.presets import PRESETS
from lrq_jax.reproduce import PLACES
from lrq_jax.resources import Resources

FORMATS = (
    (".pt, .pth, .th", "PyTorch state dicts and checkpoints"),
    (".safetensors", "the same names"),
    (".npz", "PyTorch's or Flax's names"),
    (".onnx", "with its batch norms kept (pip install 'lrq_jax[onnx]')"),
    (".h5, .keras", "Keras 2 and 3, whole models and weights (pip install 'lrq_jax[keras]')"),
    (".msgpack, orbax directory", "Flax ResNets"),
)
"""File names and what they hold, as `load_teacher` and `scripts/convert_teacher.py` read them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a config.

    Attributes:
      name: as the command line spells it after `--config.`.
      default: of `base_config()`; None where the preset or the teacher decides.
      meaning: a sentence or less.
    """

    name: str
    default: object
    meaning: str


def config_fields() -> list[Field]:
    """Every field of a config, in its order."""
    flat = _flatten(base_config().to_dict())
    meanings = _meanings()
    return [
        Field(name=name, default=flat[name], meaning=meanings.get(name, ""))
        for name in field_names(base_config().to_dict())
    ]


def _flatten(config: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _meanings() -> dict[str, str]:
    student = {f"student.{name}": text for name, text in _attributes(QuantSpec).items()}
    top = {PLACES.get(name, name): text for name, text in _attributes(RunSettings).items()}
    method = {f"method.{name}": text for name, text in _comments(Method).items()}
    method["steps"] = method.pop("method.steps")
    distributed = "this is one of several processes that train together; see `lrq_jax.processes`"
    return {
        **top, **student, **method, **_attributes(Resources), "distributed": distributed
    }  # fmt: skip


def _attributes(described: type) -> dict[str, str]:
    """The `Attributes:` section of a class's docstring, by attribute."""
    section = (inspect.getdoc(described) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = {}
    for entry in re.split(r"\n(?=  \w)", f"\n{section}"):
        names, _, text = entry.strip().partition(": ")
        for name in names.split(", "):
            found[name] = " ".join(text.split())
    return found


def _comments(described: type) -> dict[str, str]:
    """The comment of each field of a dataclass: on its line, or on the lines above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(described).splitlines():
        if match := re.match(r"    # (?!---)(.*)$", line):
            above.append(match[1])
            continue
        if match := re.match(r"    (\w+): [^#=]+ = [^#]*(?:# (.*))?$", line):
            found[match[1]] = " ".join([*above, match[2] or ""]).strip()
        above = []
    return found


def presets() -> dict[str, str]:
    """Preset -> what it is, the first sentence of its docstring."""
    return {
        name: re.split(r"(?<=\.)\s", " ".join((inspect.getdoc(make) or "").split()))[0]
        for name, make in PRESETS.items()
    }


def overview() -> str:
    """Presets, file formats and networks, for a terminal."""
    parts = [
        ("Presets, --config.method.preset=NAME", _columns(presets().items())),
        ("Files that a teacher is read from, --config.teacher.path=FILE", _columns(FORMATS)),
        ("Networks, found in the file or named at conversion", list_networks()),
    ]
    return "\n\n".join(f"{title}:\n\n{text}" for title, text in parts)


def fields_text() -> str:
    """Every field with its default and meaning, for a terminal."""
    rows = [(f"--config.{field.name}={_show(field)}", field.meaning) for field in config_fields()]
    return "\n".join(f"{flag}\n    {meaning}" for flag, meaning in rows)


def _columns(pairs: Iterable[tuple[str, str]]) -> str:
    rows = list(pairs)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {text}" for name, text in rows)


def _show(field: Field) -> str:
    if field.default is not None:
        return f"{field.default}"
    return "(the preset's)" if _of_preset(field) else ""


def _of_preset(field: Field) -> bool:
    return field.default is None and field.name.startswith(("method.", "student.", "steps"))


def markdown() -> str:
    """The configuration reference of the docs."""
    lines = [
        "# Configuration reference",
        "",
        "Made from the code by `python -m lrq_jax.reference`; a test keeps it current. Each field is",
        "set on the command line as `--config.FIELD=VALUE`, in a config file as `config.FIELD = VALUE`",
        "and in the library as `api.quantize(..., fields={FIELD: VALUE})`. A default of *preset* is",
        "what the preset says, in `lrq_jax/presets.py`.",
        "",
        "## Presets",
        "",
        "| preset | |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in presets().items()),
    ]
    groups: dict[str, list[Field]] = {}
    for field in config_fields():
        groups.setdefault(field.name.rpartition(".")[0], []).append(field)
    for group in sorted(groups, key=lambda name: ("", "teacher", "data", "student", "method").index(name)):  # fmt: skip
        lines += [
            "",
            f"## {f'`{group}`' if group else 'The run'}",
            "",
            "| field | default | meaning |",
        ]
        lines += ["|---|---|---|"]
        for field in groups[group]:
            default = "*preset*" if _of_preset(field) else f"`{field.default!r}`"
            meaning = field.meaning.replace("|", "\\|")
            lines.append(f"| `{field.name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")

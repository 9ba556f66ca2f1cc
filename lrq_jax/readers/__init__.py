"""Checkpoints in: PyTorch and safetensors files, read without PyTorch, and our own teachers."""

from lrq_jax.readers.convert import convert_teacher, describe, read_checkpoint
from lrq_jax.readers.detection import detect_arch
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.names import match_variables, unwrap_state_dict
from lrq_jax.readers.safetensors_file import read_safetensors_file
from lrq_jax.readers.store import load_teacher, save_embedded, save_teacher
from lrq_jax.readers.teacher import Teacher, teacher_hash
from lrq_jax.readers.torch_file import read_torch_file

__all__ = [
    "ReaderError",
    "Teacher",
    "convert_teacher",
    "describe",
    "detect_arch",
    "load_teacher",
    "match_variables",
    "read_checkpoint",
    "read_safetensors_file",
    "read_torch_file",
    "save_embedded",
    "save_teacher",
    "teacher_hash",
    "unwrap_state_dict",
]

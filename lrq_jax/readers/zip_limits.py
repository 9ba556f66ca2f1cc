"""What a zip archive may hold before anything of it is unpacked."""

from __future__ import annotations

import zipfile

from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.torch_pickle import MAX_BYTES

_MAX_RATIO = 100
"""Unpacked bytes for one of the file; trained weights hardly shrink."""
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def check_archive(archive: zipfile.ZipFile, file_size: int) -> None:
    """Refuses what would unpack to more than a file of weights can.

    Raises:
      ReaderError: members that claim too many bytes, or compressed in a way of which zipfile does
        not hold them to what they claim.
    """
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > MAX_BYTES or total > _MAX_RATIO * file_size:
        raise ReaderError(
            f"found an archive of {file_size} bytes that unpacks to {total}, expected at most "
            f"{MAX_BYTES} and {_MAX_RATIO} times the file"
        )
    for member in members:
        if member.compress_type not in _COMPRESSIONS:
            raise ReaderError(
                f"found member {member.filename!r} of compression {member.compress_type}, expected stored or "
                "deflated members, as torch, NumPy and Keras write them"
            )

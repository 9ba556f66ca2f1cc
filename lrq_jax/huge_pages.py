"""Large pages of memory for arrays, on Linux.

A step of training on a CPU takes hundreds of MiB from the system and gives them back. In pages of
4 KiB that costs a quarter of the step (ResNet-20, batch 64, AMD Zen 5: 420 ms against 325); in pages
of 2 MiB nearly nothing. Most kernels give those on request alone, and glibc requests them when a
variable of the environment said so before the process started.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
"""glibc's variable of the environment, `NAME=VALUE` joined by colons, and the name that matters."""
SWITCH = "LRQ_HUGE_PAGES"
"""Our variable of the environment: 0 leaves the process as it is."""

_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FIRST_GLIBC = (2, 35)


def restart_with_huge_pages() -> None:
    """Starts this program again in its own place, huge pages requested.

    Returns where they are requested already or cannot be: other systems and C libraries, a kernel
    that gives them to everybody or nobody, `LRQ_HUGE_PAGES=0`.
    """
    tunables = os.environ.get(VARIABLE, "")
    if TUNABLE in tunables or os.environ.get(SWITCH) == "0" or not _on_request():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, VARIABLE: requested(tunables)})
    except OSError as error:  # slower, not wrong
        print(
            f"lrq_jax: huge pages: found no way to start {sys.executable!r} again ({error}), going on "
            f"without; {SWITCH}=0 stops trying",
            file=sys.stderr,
        )


def requested(tunables: str) -> str:
    """glibc's tunables with huge pages requested; what they say of them, if anything, stays."""
    if TUNABLE in tunables:
        return tunables
    return ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))


def given(tunables: str) -> bool:
    """Whether a process that starts with these tunables gets huge pages for its arrays here."""
    try:
        if "[always]" in _POLICY.read_text(encoding="ascii"):
            return True
    except OSError:
        return False
    return f"{TUNABLE}=1" in tunables.split(":") and _on_request()


def _on_request() -> bool:
    library, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if library != "glibc" or numbers < _FIRST_GLIBC:
        return False
    try:
        return "[madvise]" in _POLICY.read_text(encoding="ascii")
    except OSError:
        return False

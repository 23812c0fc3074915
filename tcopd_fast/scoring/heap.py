"""Keeps host memory flat in the number of frozen models whose weights come and go on a CPU."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
M_MMAP_THRESHOLD = -3
RETURNED_FROM = 256 << 10


def return_large_blocks() -> None:
    """From here on host memory of 256 KiB or more goes back to the system as soon as it is freed.

    glibc raises the size from which it does so to that of the blocks it sees, up to 32 MiB; layer-sized blocks of one
    model after another then leave a heap full of holes, which grows with every model. Asking the system for every
    larger block takes time, so this is for runs that gave up speed for memory. Without glibc nothing changes.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, RETURNED_FROM)

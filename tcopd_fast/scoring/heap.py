"""Keeps the host memory of a scoring pass flat in the number of streamed models."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# From glibc's malloc.h, and the largest threshold that it would choose by itself on 64 bits.
M_MMAP_THRESHOLD = -3
LARGEST_THRESHOLD = 32 << 20
RETURNED_FROM = 256 << 10


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Within the block, host memory of 256 KiB or more goes back to the system as soon as it is freed.

    glibc raises the size from which it does so to that of the blocks it sees, up to 32 MiB; layer-sized blocks of one
    model after another then leave a heap full of holes, which grows with every model. After the block the largest
    threshold holds, at which glibc would have arrived. Without glibc nothing changes.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(M_MMAP_THRESHOLD, RETURNED_FROM)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)


@cache
def _glibc() -> Any:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None

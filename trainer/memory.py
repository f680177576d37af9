"""Memory of the process."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library reuse freed blocks instead of giving them back to the system.

    A training step on the CPU frees and asks for the same large blocks again and again; by default
    each comes as fresh pages that have to be cleared first. Kept, a step of the demo was 2 to 4
    times faster on two cores (docs/experiments.md). It costs memory that stays at its peak, and
    does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)

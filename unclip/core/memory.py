"""What the C library does with memory that is freed."""

import ctypes
import os

# malloc.h's numbers of what is set: the least block that is mapped on its own, how much may lie free at the end of the
# heap, and by how much that grows at once; all in bytes
SETTINGS = {-3: 2**30, -1: 2**31 - 1, -2: 2**26}


def keep_memory() -> bool:
    """Tells the C library to keep what this process frees, for its next tensors. False where that is not glibc.

    By default glibc gives blocks of more than 32 MiB back at once and asks for them anew, and the system clears every
    page of them again: of a 1024×1024 picture on a CPU that is a third of the time. Trainings here have few such blocks
    and do not gain. It holds for the whole process, so that only the command calls it and not the library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in SETTINGS.items())

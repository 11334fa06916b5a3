"""The command line's process: ``chestxray-covid``, and ``python -m chestxray_covid``, which
``torchrun`` and ``accelerate launch`` run, too.
"""

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

#: Under these glibc takes memory in huge pages and keeps it until the process ends, so that a
#: training step on a CPU does not ask the system for the same memory again and again.
KEPT = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296"


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["train"]:
        _start_again_with_memory_kept()
    from chestxray_covid.cli import main as commands

    commands(prog_name="chestxray-covid")


def _start_again_with_memory_kept() -> None:
    """Begin anew under :data:`KEPT`, which glibc reads before Python runs, unless told otherwise.

    The process stays the same one for whoever started it. Either variable, once set, ends this.
    A host that runs the module inside a program of its own is not started again.
    """
    told = {"GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE"} & os.environ.keys()
    if told or not _is_whole_program() or not _has_tunable_glibc():
        return
    # torch's own huge pages would only round memory up that glibc's hold anyway.
    environment = {**os.environ, "GLIBC_TUNABLES": KEPT, "THP_MEM_ALLOC_ENABLE": "0"}
    with suppress(OSError):  # then it trains as it is, in more time
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _is_whole_program() -> bool:
    """Return whether Python was started for this command line, and can be started again so."""
    name, *given = sys.argv
    own = Path(name).stem in ("chestxray-covid", "__main__")
    frozen = getattr(sys, "frozen", False)
    return own and sys.orig_argv[-len(given) :] == given and bool(sys.executable) and not frozen


def _has_tunable_glibc() -> bool:
    """Return whether the C library is a glibc that knows huge pages: 2.35 or newer."""
    if sys.platform != "linux":
        return False
    library, version = platform.libc_ver()
    return library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


if __name__ == "__main__":
    main()

"""The command line's process: ``chestxray-covid``, and ``python -m chestxray_covid``, which
``torchrun`` and ``accelerate launch`` run, too.
"""

import os
import platform
import sys

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
    """
    libc, version = platform.libc_ver()
    told = {"GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE"} & os.environ.keys()
    known = libc == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    if told or not known or not sys.executable or getattr(sys, "frozen", False):
        return
    # torch's own huge pages would only round memory up that glibc's hold anyway.
    environment = {**os.environ, "GLIBC_TUNABLES": KEPT, "THP_MEM_ALLOC_ENABLE": "0"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    main()

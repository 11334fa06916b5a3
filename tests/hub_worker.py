"""A process that resolves checkpoints for tests: one line of JSON in, one line of JSON out.

huggingface_hub reads its environment when it is imported, so the code under test runs here, in one
process for many cases, and forks where a case has to die, or to run beside others.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub

from chestxray_covid import hub, hub_cache
from chestxray_covid.checkpoint import load_checkpoint

hub_cache.BACKOFF_S = 0.001


def outcome(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return where the checkpoint is, or the error's family and message."""
    load = wanted.pop("load", False)
    try:
        folder = hub.resolve(**wanted)
        if load:
            load_checkpoint(folder)
    except BaseException as error:
        families = [kind.__name__ for kind in type(error).__mro__]
        return {"error": families, "message": told(error)}
    return {"path": str(folder), "files": {p.name: p.stat().st_size for p in folder.iterdir()}}


def told(error: BaseException) -> str:
    """Return all that a traceback shows of an error: its notes, and what it came of."""
    notes = " ".join(getattr(error, "__notes__", []))
    earlier = error.__cause__ or error.__context__
    return f"{error} {notes} {told(earlier) if earlier else ''}"


def start(wanted: dict[str, Any]) -> tuple[int, int]:
    """Resolve in a child of this process; return its number and where its answer will be."""
    readable, writable = os.pipe()
    as_nobody, locks = wanted.pop("as_nobody", False), wanted.pop("locks", True)
    if child := os.fork():
        os.close(writable)
        return child, readable
    if as_nobody and os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if not locks:
        fcntl.flock = lambda handle, operation: None
    os.write(writable, json.dumps(outcome(wanted)).encode())
    os._exit(0)


def finish(child: int, readable: int) -> Any:
    with os.fdopen(readable, "rb") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text or b"null")


def main() -> None:
    running: dict[int, int] = {}
    for line in sys.stdin:
        command, wanted = json.loads(line)
        answer: Any
        if command == "resolve":
            answer = outcome(wanted)
        elif command == "together":
            answer = [finish(*child) for child in [start(dict(one)) for one in wanted]]
        elif command == "start":
            child, readable = start(wanted)
            running[child] = readable
            answer = child
        elif command == "finish":
            answer = finish(wanted, running.pop(wanted))
        else:
            answer = {"version": huggingface_hub.__version__, "file": str(Path(hub.__file__))}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Progress bars: what a killed process leaves behind must not stop others."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from chestxray_covid.progress import Bar

KILLED_WITH_THE_LOCK = """
import os, signal, threading
from chestxray_covid.progress import Bar
list(Bar(range(3), disable=True))
child = os.fork()
if not child:
    Bar.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
list(Bar(range(3), disable=True))
print(threading.active_count())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_process_that_was_killed_with_the_lock_keeps_nobody_waiting_and_no_thread_is_left() -> (
    None
):
    command = [sys.executable, "-c", KILLED_WITH_THE_LOCK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1"]


def test_a_bar_shows_what_tqdm_shows() -> None:
    shown = io.StringIO()
    assert list(Bar(range(3), "decode", unit="img", file=shown)) == [0, 1, 2]
    assert "decode: 100%" in shown.getvalue()
    assert "3/3" in shown.getvalue()


def test_without_a_standard_error_as_under_pythonw_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(Bar(range(3), "decode")) == [0, 1, 2]

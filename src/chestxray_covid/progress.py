"""Progress bars that leave neither a thread behind, nor a lock that other processes share."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    _Tqdm = tqdm[Any]
else:
    _Tqdm = tqdm


class Bar(_Tqdm):
    """A bar of tqdm's, with its arguments.

    tqdm's own lock is shared with forked processes: one that is killed while it holds it, even for
    a bar that is disabled, would keep all others waiting for ever. Its thread, which wakes bars
    that have stalled, is not needed where every update looks at the clock. Where a process has no
    standard error, as under pythonw or a service that closes it, nothing is shown.
    """

    _lock = threading.RLock()
    monitor_interval = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if sys.stderr is None:
            options["disable"] = True
        super().__init__(*arguments, **{"miniters": 1, **options})

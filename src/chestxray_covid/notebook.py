"""How what has a text shows itself in a notebook."""

from __future__ import annotations

from typing import Any


class ShownAsText:
    """Shown by IPython as ``print`` shows it, not as the list of all of its fields."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # IPython takes a class's own ``__repr__``, a dataclass's, before what is inherited.
        cls._repr_pretty_ = ShownAsText._repr_pretty_  # type: ignore[method-assign]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

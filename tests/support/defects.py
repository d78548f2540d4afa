"""Deliberately broken classes, each with the checks that are to catch it."""

from __future__ import annotations

from collections.abc import Callable


class Defects(dict[str, tuple[type, set[str]]]):
    """Broken classes by name.

    Args:
        finish: what is made of each class, as a class decorator does.
    """

    def __init__(self, finish: Callable[[type], type] = lambda cls: cls) -> None:
        super().__init__()
        self._finish = finish

    def caught_by(self, *checks: str) -> Callable[[type], type]:
        """Note a class that these checks are to catch, and no others."""

        def add(cls: type) -> type:
            made = self._finish(cls)
            self[made.__name__] = (made, set(checks))
            return made

        return add

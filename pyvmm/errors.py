"""Errors that more than one layer raises or catches.

An error that only one module raises lives in that module, next to the code that raises it.
"""

from __future__ import annotations


class GuestMemoryError(ValueError):
    """[gpa, gpa + length) is not entirely guest RAM."""

    def __init__(self, gpa: int, length: int) -> None:
        super().__init__(f"{length} bytes at GPA {gpa:#x} are not guest RAM")
        self.gpa, self.length = gpa, length

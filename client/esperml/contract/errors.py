"""The one error for input that breaks the contract."""

from __future__ import annotations


class InvalidFieldError(ValueError):
    """A field of a message is missing or out of range.

    Attributes:
        field: path of the field from the message that was received, for example ``state.graph.layers[2].type``.
        problem: what is wrong with it, in words.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

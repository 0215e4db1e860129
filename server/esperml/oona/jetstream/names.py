"""Names of streams and subjects, and how any id becomes one token of a subject."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from esperml.contract import kind_name

if TYPE_CHECKING:
    from esperml.v1 import event_pb2

_PLAIN: Final = frozenset((string.ascii_letters + string.digits + "-_").encode())
_ESCAPED: Final = re.compile(rb"=([0-9A-F]{2})")

# No id becomes this token: behind "=" there are hexadecimal digits, or nothing.
_MIXED: Final = "=mixed"


def to_token(text: str) -> str:
    """One token of a subject for any text: letters, digits, ``-`` and ``_`` as they are, other bytes as ``=XX``.

    The empty text is a lone ``=``.
    """
    encoded = text.encode("utf-8", "surrogatepass")
    return "".join(chr(byte) if byte in _PLAIN else f"={byte:02X}" for byte in encoded) or "="


def from_token(token: str) -> str:
    """The text of a token that :func:`to_token` made."""
    encoded = token.encode().removesuffix(b"=")  # An "=" at the end has no digits: the empty text.
    return _ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), encoded).decode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class TopicNames:
    """The names of one kind.

    Attributes:
        stream: the stream.
        subjects: everything in it.
        runs: the events, over all runs.
        states: what is known beside the events: publishers, and the floor.
        floor: where the floor is moved.
        notices: where gateways tell one another of growth; not stored.
    """

    stream: str
    subjects: str
    runs: str
    states: str
    floor: str
    notices: str

    @classmethod
    def of(cls, prefix: str, kind: event_pb2.Kind.ValueType) -> TopicNames:
        """The names of ``kind`` under a prefix."""
        name = kind_name(kind)
        root = f"{prefix}.{name}"
        return cls(
            stream=f"{prefix}_{name}".upper(),
            subjects=f"{root}.>",
            runs=f"{root}.run.*",
            states=f"{root}.state.>",
            floor=f"{root}.state.floor",
            notices=f"{prefix}._notice.{name}",
        )

    def run(self, run_id: str | None) -> str:
        """The subject of a run's events; None: of events of many runs."""
        return self.runs[:-1] + (_MIXED if run_id is None else to_token(run_id))

    def publisher(self, client_id: str) -> str:
        """The subject of a publisher's state."""
        return f"{self.states[:-1]}publisher.{to_token(client_id)}"

    def publisher_of(self, subject: str) -> str | None:
        """The publisher whose state a subject carries, or None where it carries none."""
        head, _, token = subject.rpartition(".")
        return from_token(token) if head == f"{self.states[:-1]}publisher" else None

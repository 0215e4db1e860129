"""Who may do what on the bus: pure rules over roles and runs. Who somebody is, others find out.

=========== ============================= ============================================ ======
role        publishes                     reads                                        groups
=========== ============================= ============================================ ======
host        telemetry, events, outcomes   commands, of the runs that it names          no
controller  decisions, commands,          all                                          yes
            experience
viewer      nothing                       all                                          no
admin       all                           all                                          yes
=========== ============================= ============================================ ======

All of it within the caller's runs. Whoever may not see every run must name those that it reads, and joins no group: a
group's place in the log is everybody's.
"""

from __future__ import annotations

import enum
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from esperml.contract import KINDS, kind_name
from esperml.contract.kinds import MAX_RUN_ID_LENGTH
from esperml.oona.rejection import RequestRejectedError
from esperml.v1 import event_pb2, oona_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from esperml.contract import KindValue


class Role(enum.StrEnum):
    """What somebody is to the system."""

    HOST = "host"
    CONTROLLER = "controller"
    VIEWER = "viewer"
    ADMIN = "admin"


PUBLISHES: Final[Mapping[Role, frozenset[KindValue]]] = {
    Role.HOST: frozenset({event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES}),
    Role.CONTROLLER: frozenset({event_pb2.KIND_DECISIONS, event_pb2.KIND_COMMANDS, event_pb2.KIND_EXPERIENCE}),
    Role.VIEWER: frozenset(),
    Role.ADMIN: frozenset(KINDS),
}
"""Kinds that each role publishes."""

READS: Final[Mapping[Role, frozenset[KindValue]]] = {
    Role.HOST: frozenset({event_pb2.KIND_COMMANDS}),
    Role.CONTROLLER: frozenset(KINDS),
    Role.VIEWER: frozenset(KINDS),
    Role.ADMIN: frozenset(KINDS),
}
"""Kinds that each role reads."""

_IN_GROUPS: Final = frozenset({Role.CONTROLLER, Role.ADMIN})


class RunPatterns:
    """A set of runs, as patterns name it.

    Args:
        patterns: each is the id of a run, or the beginning of ids with ``*`` behind it; ``*`` alone is every run.
            Nothing else has a meaning of its own: ``team-a/*`` names the runs whose ids begin with ``team-a/``.

    Raises:
        ValueError: there is none, or one has no or more than 128 characters, characters that do not print, or a ``*``
            before its end.

    Attributes:
        patterns: as given.
        every: whether every run is in the set.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        if not self.patterns:
            raise ValueError("at least one run is required; * stands for every run")
        for pattern in self.patterns:
            _check_pattern(pattern)
        self.every = "*" in self.patterns
        self._exact = frozenset(pattern for pattern in self.patterns if not pattern.endswith("*"))
        self._beginnings = tuple(pattern[:-1] for pattern in self.patterns if pattern.endswith("*"))

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._exact or run_id.startswith(self._beginnings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunPatterns) and frozenset(self.patterns) == frozenset(other.patterns)

    def __hash__(self) -> int:
        return hash(frozenset(self.patterns))

    def __str__(self) -> str:
        return ", ".join(self.patterns)


def _check_pattern(pattern: str) -> None:
    if not 1 <= len(pattern) <= MAX_RUN_ID_LENGTH:
        raise ValueError(f"run {pattern!r} must have 1 to {MAX_RUN_ID_LENGTH} characters")
    if not pattern.isprintable():
        raise ValueError(f"run {pattern!r} has characters that do not print")
    if "*" in pattern[:-1]:
        raise ValueError(f"run {pattern!r} may have * only as its last character")


EVERY_RUN: Final = RunPatterns(["*"])


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who showed a token.

    Attributes:
        name: the token's name, which stands for whoever holds it.
        role: what it is to the system.
        runs: the runs that it has to do with.
        token_id: tells tokens of one name apart.
        limited: whether the limits for one token hold for it; they do not for the server's own.
    """

    name: str
    role: Role
    runs: RunPatterns
    token_id: str = ""
    limited: bool = True

    def __str__(self) -> str:
        return f"token {self.name!r} (role {self.role}, runs {self.runs})"

    def publisher(self, client_id: str) -> str:
        """The name under which the sequence of a client is kept: nobody gets at that of another token's client."""
        return f"{self.name}/{client_id}"


CALLER: Final[ContextVar[Caller | None]] = ContextVar("caller", default=None)
"""Who makes the present call; None where the server asks for no tokens. Set before a service sees the call."""


def forbidden(message: str) -> RequestRejectedError:
    """The rejection of what a token does not allow."""
    return RequestRejectedError(oona_pb2.REJECT_REASON_FORBIDDEN, message)


def check_publish(caller: Caller, kind: KindValue) -> None:
    """Raise :class:`RequestRejectedError` unless ``caller`` may publish in the log of ``kind``.

    What is no kind is nothing to be allowed, and passes.
    """
    if kind in KINDS and kind not in PUBLISHES[caller.role]:
        raise forbidden(f"publish.kind: {caller} may not publish {kind_name(kind)}; {_who(PUBLISHES, kind)} may")


def check_runs(caller: Caller, run_ids: Iterable[str]) -> None:
    """Raise :class:`RequestRejectedError` unless ``caller`` may publish events of these runs, one for each event."""
    if not caller.runs.every:
        for run_id in set(run_ids):
            if run_id not in caller.runs:
                raise forbidden(f"publish.events: run {run_id!r} is not one of those of {caller}")


def check_twins(caller: Caller, publish: oona_pb2.Publish) -> None:
    """Raise :class:`RequestRejectedError` unless every twin that a run names at its start is one of the caller's runs.

    What comes of a run says something of its twin too: its rewards compare the two.
    """
    if caller.runs.every or publish.kind != event_pb2.KIND_EVENTS:
        return
    for index, event in enumerate(publish.events):
        twin = event.run_started.paired_run
        if twin and twin not in caller.runs:
            field = f"publish.events[{index}].run_started.paired_run"
            raise forbidden(f"{field}: run {twin!r} is not one of those of {caller}")


def check_subscribe(caller: Caller, subscribe: oona_pb2.Subscribe) -> None:
    """Raise :class:`RequestRejectedError` unless ``caller`` may read what it asks for, and in the way it asks.

    What is no kind is nothing to be allowed, and passes.
    """
    kind = subscribe.kind
    if kind in KINDS and kind not in READS[caller.role]:
        raise forbidden(f"subscribe.kind: {caller} may not read {kind_name(kind)}; {_who(READS, kind)} may")
    if subscribe.group and not (caller.role in _IN_GROUPS and caller.runs.every):
        raise forbidden(
            f"subscribe.group: {caller} may not join groups; controllers and admins of every run may. Leave it empty "
            "for a reader of your own"
        )
    if (caller.role is Role.HOST or not caller.runs.every) and not subscribe.run_ids:
        raise forbidden(f"subscribe.run_ids: {caller} must name the runs that it reads")
    for run_id in subscribe.run_ids:
        if run_id not in caller.runs:
            raise forbidden(f"subscribe.run_ids: run {run_id!r} is not one of those of {caller}")


def _who(rights: Mapping[Role, frozenset[KindValue]], kind: KindValue) -> str:
    return f"role {' or '.join(role for role in Role if kind in rights[role])}"

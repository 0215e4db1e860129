"""Tokens: making them, keeping their hashes in a file, and knowing them again.

A token is ``esper_<id>_<secret>``: the id finds its entry, and the secret is 256 random bits. The file has only the
SHA-256 of the whole, which needs no salt and no slow hash with a secret of that strength. Several tokens may have one
name, as when one replaces another: the name is who it is, in logs, in limits, and before the ids of its clients.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from esperml.oona.access import Caller, Role, RunPatterns

_SECRET_BYTES: Final = 32
_ID_BYTES: Final = 4
_TOKEN: Final = re.compile(r"esper_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class TokensError(ValueError):
    """The file of tokens cannot be used, or what was to be done with it cannot be.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r} must have 1 to 64 letters, digits, dots, dashes or underscores")
    return name


def _checked_runs(runs: tuple[str, ...]) -> tuple[str, ...]:
    return RunPatterns(runs).patterns


class Entry(BaseModel):
    """What the file has of one token.

    Attributes:
        id: finds it; part of the token.
        name: who holds it.
        role: what that is to the system.
        runs: patterns of the runs that it has to do with; see :class:`~esperml.oona.access.RunPatterns`.
        sha256: of the whole token, in hexadecimal digits.
        created_at: when it was made.
        expires_at: when it ends. None: never.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    name: Annotated[str, AfterValidator(_checked_name)]
    role: Role
    runs: Annotated[tuple[str, ...], AfterValidator(_checked_runs)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None

    def expired(self, now: datetime) -> bool:
        """Whether it has ended."""
        return self.expires_at is not None and now >= self.expires_at


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    tokens: list[Entry] = []


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _new(taken: Collection[str] = ()) -> tuple[str, str]:
    """The id of a new token, which is none of ``taken``, and the token."""
    token_id = secrets.token_hex(_ID_BYTES)
    while token_id in taken:
        token_id = secrets.token_hex(_ID_BYTES)
    return token_id, f"esper_{token_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"


def _said(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def load(path: Path) -> list[Entry]:
    """The entries of a file. Raises :class:`TokensError` where it is not there, not readable, or not as it must be."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise TokensError(path, error.strerror or str(error)) from error
    try:
        entries = _Document.model_validate_json(text).tokens
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the file"
        raise TokensError(path, f"{where}: {_said(error)}") from None
    if len({entry.id for entry in entries}) < len(entries):
        raise TokensError(path, "two tokens have one id")
    return entries


def create(
    path: Path, *, role: Role, runs: Sequence[str], expires_at: datetime | None, name: str = ""
) -> tuple[str, Entry]:
    """Make a token and write its entry, into a new file where there is none.

    Args:
        path: the file.
        role: what its holder is to the system.
        runs: patterns of the runs that it has to do with.
        expires_at: when it ends. None: never.
        name: who shall hold it. Default: the role and the token's id.

    Returns:
        The token, which is written nowhere, and its entry.

    Raises:
        TokensError: a field is not as it must be, or the file cannot be read or written.
    """
    with _writing(path) as entries:
        token_id, token = _new({entry.id for entry in entries})
        try:
            entry = Entry(
                id=token_id,
                name=name or f"{role}-{token_id}",
                role=role,
                runs=tuple(runs),
                sha256=_hash(token),
                created_at=datetime.now(UTC),
                expires_at=expires_at,
            )
        except ValidationError as error:
            raise TokensError(path, _said(error)) from None
        entries.append(entry)
    return token, entry


def revoke(path: Path, which: str) -> list[Entry]:
    """Take a token out of the file by its id, or all of a name; returns what is out.

    Raises:
        TokensError: there is none of that id or name, or the file cannot be read or written.
    """
    with _writing(path) as entries:
        revoked = [entry for entry in entries if which in (entry.id, entry.name)]
        if not revoked:
            raise TokensError(path, f"there is no token with the id or the name {which!r}")
        entries[:] = [entry for entry in entries if entry not in revoked]
    return revoked


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[list[Entry]]:
    """The file's entries, to be changed; they are written when the context ends well, all or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever else writes waits here; readers see the old file or the new one.
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = load(path) if path.exists() else []
            yield entries
            fresh = path.with_name(path.name + ".new")
            mode = path.stat().st_mode if path.exists() else 0o600
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
                file.write(_Document(tokens=entries).model_dump_json(indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    except OSError as error:
        raise TokensError(path, error.strerror or str(error)) from error


class Tokens:
    """Knows callers by their tokens.

    Args:
        entries: what the file has.

    Attributes:
        look_again: called where a token is unknown, before it is refused: it may have been made just now.
    """

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self._entries: dict[str, tuple[Entry, Caller]] = {}
        self._internal: dict[str, tuple[Entry, Caller]] = {}
        self.look_again: Callable[[], None] = lambda: None
        self.replace(entries)

    def replace(self, entries: Sequence[Entry]) -> None:
        """Know these from now on, and those of :meth:`add_internal`."""
        self._entries = {entry.id: (entry, _caller(entry)) for entry in entries}

    def add_internal(self, name: str, role: Role) -> str:
        """Make a token for every run that is in no file, and return it. ``name`` may be none that a file can have."""
        token_id, token = _new()
        entry = Entry.model_construct(
            id=token_id, name=name, role=role, runs=("*",), sha256=_hash(token), created_at=datetime.now(UTC)
        )
        self._internal[token_id] = (entry, replace(_caller(entry), limited=False))
        return token

    def identify(self, token: str, now: datetime | None = None) -> Caller | str:
        """Who holds a token, or why that cannot be said, in words that give nothing away."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return "the token is none: it looks like esper_0a1b2c3d_…, as `esper token new` printed it"
        if match[1] not in self._internal and match[1] not in self._entries:
            self.look_again()
        found = self._internal.get(match[1]) or self._entries.get(match[1])
        if found is None or not hmac.compare_digest(found[0].sha256, _hash(token)):
            return "the token is unknown here, or was revoked; `esper token new` makes another"
        entry, caller = found
        if entry.expired(now or datetime.now(UTC)):
            return f"token {entry.name!r} has expired; `esper token new` makes another"
        return caller

    def standing(self, caller: Caller, now: datetime | None = None) -> Caller | str:
        """What has become of a caller that was identified before: as :meth:`identify` would say now."""
        found = self._internal.get(caller.token_id) or self._entries.get(caller.token_id)
        if found is None:
            return f"token {caller.name!r} was revoked; `esper token new` makes another"
        entry, now_caller = found
        if entry.expired(now or datetime.now(UTC)):
            return f"token {entry.name!r} has expired; `esper token new` makes another"
        return now_caller


def _caller(entry: Entry) -> Caller:
    return Caller(entry.name, entry.role, RunPatterns(entry.runs), entry.id)

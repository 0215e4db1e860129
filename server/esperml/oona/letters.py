"""Dead letters of one group: what is stored of them, and what is being replayed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from esperml.oona.log import NO_LETTERS
from esperml.oona.replays import Replays

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping

    from esperml.oona.log import DeadLetter, Log

# Letters that are read at once, and that are changed in one transaction.
_READ: Final = 16
_PAGE: Final = 256
_PAGE_BYTES: Final = 4 * 2**20


class Letters:
    """Dead letters of one group.

    Args:
        kind: the log.
        group: the group's name.
        log: where they are kept.
        save: stores the group's progress together with :attr:`unsaved` and with what it is given, which no other save
            stores.
        wake: lets the members look for what they are to be delivered.

    Attributes:
        replays: those that were given back to the group.
        unsaved: what is to be stored with the group's progress next, by offset; None: to be deleted.
    """

    def __init__(
        self,
        kind: int,
        group: str,
        log: Log,
        save: Callable[[Mapping[int, DeadLetter | None]], asyncio.Future[None]],
        wake: Callable[[], None],
    ) -> None:
        self.replays = Replays()
        self.unsaved: dict[int, DeadLetter | None] = {}
        self._kind = kind
        self._group = group
        self._log = log
        self._save = save
        self._wake = wake
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[int]] = set()
        # Those of which a change is being stored, and none was put meanwhile.
        self._storing: set[int] = set()
        self._offsets: dict[int, None] = {}
        for offset, replaying in log.letters().get((kind, group), {}).items():
            self._offsets[offset] = None
            if replaying:
                self.replays.add(offset)

    def __len__(self) -> int:
        return len(self._offsets)

    def put(self, letter: DeadLetter) -> None:
        """Have a record that was given up stored with the group's progress. It is not being replayed."""
        self._offsets[letter.offset] = None
        self.replays.remove(letter.offset)
        self._storing.discard(letter.offset)
        self.unsaved[letter.offset] = letter

    def acknowledged(self, offset: int) -> None:
        """Have a letter deleted with the group's progress."""
        self._offsets.pop(offset, None)
        self.unsaved[offset] = None

    async def read(self, offset: int) -> DeadLetter | None:
        """The letter at an offset, if there is one.

        Raises:
            LogDamagedError: what is stored cannot be read.
            LogUnavailableError: the log cannot be asked now.
        """
        if offset in self.unsaved:
            return self.unsaved[offset]
        letters = await self._log.dead_letters(self._kind, self._group, offset, 1)
        return letters[0] if letters and letters[0].offset == offset else None

    async def end_replays(self, now_ns: int) -> bool:
        """Make dead letters again of what failed too often when replayed. Returns whether there was any.

        Raises:
            LogDamagedError: what is stored cannot be read.
            LogUnavailableError: the log cannot be asked now.
        """
        given_up = list(self.replays.given_up.items())
        for offset, (attempts, reason) in given_up:
            letter = await self.read(offset)
            if letter is not None and offset in self.replays.given_up:
                self.put(replace(letter, attempts=attempts, reason=reason, time_ns=now_ns, replaying=False))
        return bool(given_up)

    async def page(self, first: int, limit: int) -> tuple[list[DeadLetter], int | None]:
        """Letters from an offset on, and where the next page begins, or None at the end.

        At most ``limit``, and not many more than fill a few megabytes.

        Raises:
            LogDamagedError: what is stored cannot be read.
            LogUnavailableError: the log cannot be asked now.
        """
        letters: list[DeadLetter] = []
        size = 0
        while True:
            more = await self._log.dead_letters(self._kind, self._group, first, _READ)
            for letter in more:
                if len(letters) == limit or size >= _PAGE_BYTES:
                    return letters, letter.offset
                letters.append(letter)
                size += len(letter.event)
            if len(more) < _READ:
                return letters, None
            first = letters[-1].offset + 1

    async def replay(self, offsets: Collection[int]) -> int:
        """Give letters (none named: all) back to the group. Returns how many; those that are being replayed not.

        It is carried out even where the caller is cancelled.

        Raises:
            LogDamagedError: what is stored cannot be read.
            LogUnavailableError: the log cannot be asked now; some may have been given back.
        """
        return await self._whole(self._replay(offsets))

    async def purge(self, offsets: Collection[int]) -> int:
        """Delete letters (none named: all), also those that are being replayed. Returns how many.

        It is carried out even where the caller is cancelled.

        Raises:
            LogUnavailableError: the log cannot store now; some may have been deleted.
        """
        return await self._whole(self._purge(offsets))

    async def _whole(self, change: Coroutine[None, None, int]) -> int:
        """Await a change of what is stored and of what is known of it, which are not to part if nobody waits on."""
        task = asyncio.create_task(change, name="oona-letters")
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        # Whoever asked may be gone; that is no error nobody handled.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(task)

    async def _replay(self, offsets: Collection[int]) -> int:
        count = 0
        async with self._changing:
            for chosen in self._chosen(offsets):
                found = {offset: letter for offset in chosen if (letter := await self.read(offset)) is not None}
                changed = {
                    offset: replace(letter, replaying=True)
                    for offset, letter in found.items()
                    if offset in self._offsets and offset not in self.replays
                }
                if not changed:
                    continue
                for offset in await self._store(changed):
                    self.replays.add(offset)
                self._wake()
                count += len(changed)
        return count

    async def _purge(self, offsets: Collection[int]) -> int:
        count = 0
        async with self._changing:
            for chosen in self._chosen(offsets):
                for offset in await self._store(dict.fromkeys(chosen)):
                    self._offsets.pop(offset, None)
                    self.replays.remove(offset)
                count += len(chosen)
        return count

    def _chosen(self, offsets: Collection[int]) -> Iterator[list[int]]:
        """The letters among some offsets (none: all of them), a page at a time, ascending."""
        chosen = sorted(self._offsets.keys() & set(offsets) if offsets else self._offsets)
        for start in range(0, len(chosen), _PAGE):
            yield chosen[start : start + _PAGE]

    async def _store(self, changed: Mapping[int, DeadLetter | None]) -> list[int]:
        """Store changes, or, where that is refused, none of them. Returns at which offsets no other came later."""
        # What is unsaved there goes first: another save could store it over the change.
        while not self.unsaved.keys().isdisjoint(changed):
            await self._save(NO_LETTERS)
        self._storing = set(changed)
        await self._save(changed)
        return sorted(self._storing)

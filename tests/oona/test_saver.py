from __future__ import annotations

import asyncio

import pytest

from esperml.oona.log import LogUnavailableError
from esperml.oona.saver import Saver


class Store:
    """Stores versions of a number when told to."""

    def __init__(self) -> None:
        self.version = 0
        self.asked: list[tuple[int, asyncio.Future[None]]] = []
        self.length = 10**6

    def __call__(self) -> asyncio.Future[None]:
        self.asked.append((self.version, asyncio.get_running_loop().create_future()))
        return self.asked[-1][1]

    @property
    def versions(self) -> list[int]:
        return [version for version, _ in self.asked]

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.asked) < times:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def saver(store):
    return Saver(store, lambda: store.length)


async def test_what_is_short_is_stored_with_each_change(store, saver):
    store.length = 10
    for store.version in range(3):
        saver.save()
    assert store.versions == [0, 1, 2]


async def test_changes_that_come_while_a_long_version_is_stored_share_the_next(store, saver):
    futures = []
    for store.version in range(100):
        futures.append(saver.save())
    assert store.versions == [0]
    assert not futures[0].done()
    store.asked[0][1].set_result(None)
    await store.until_asked(2)
    assert [future.done() for future in futures[:2]] == [True, False]
    # What is stored second holds all that came before.
    assert store.versions == [0, 99]
    assert not any(future.done() for future in futures[1:])
    store.asked[1][1].set_result(None)
    await asyncio.gather(*futures)
    assert len(store.asked) == 2


async def test_the_next_long_version_waits_as_long_as_the_last_one_took(store, saver):
    loop = asyncio.get_running_loop()
    first, second = saver.save(), saver.save()
    began_s = loop.time()
    while loop.time() < began_s + 0.05:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    stored_s = loop.time()
    store.asked[0][1].set_result(None)
    await first
    await store.until_asked(2)
    # The store took at least from the one to the other; timers may come early by what the clock resolves.
    assert loop.time() - stored_s >= stored_s - began_s - 0.001
    store.asked[1][1].set_result(None)
    await second


async def test_a_failure_is_told_to_those_whose_change_was_not_stored_and_to_no_other(store, saver):
    first, second, gone = saver.save(), saver.save(), saver.save()
    store.asked[0][1].set_result(None)
    await first
    gone.cancel()
    await store.until_asked(2)
    third = saver.save()
    store.asked[1][1].set_exception(LogUnavailableError("full"))
    with pytest.raises(LogUnavailableError, match="full"):
        await second
    await store.until_asked(3)
    store.asked[2][1].set_result(None)
    await third


async def test_at_the_end_everything_is_stored_at_once(store, saver):
    futures = [saver.save(), saver.save()]
    store.asked[0][1].set_result(None)
    await futures[0]
    store.version = 7
    saver.end()
    futures.append(saver.save())
    assert store.versions == [0, 7, 7]
    for _, future in store.asked[1:]:
        future.set_result(None)
    await asyncio.gather(*futures)


async def test_a_store_that_is_cancelled_cancels_those_who_wait(store, saver):
    waiting = saver.save()
    store.asked[0][1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

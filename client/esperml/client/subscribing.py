"""The half of the client that reads: subscriptions, and requests on the present stream with what waits for answers."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Final

import structlog

from esperml.client.calls import TopicCalls
from esperml.client.errors import OonaError, rejection
from esperml.client.flow import FlowControl
from esperml.client.retry import RETRYABLE_REJECTIONS, Backoff
from esperml.client.subscription import Subscription
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import timedelta

    from esperml.client.credentials import Credentials
    from esperml.v1 import event_pb2

_log = structlog.get_logger(__name__)

CREDIT_BYTES: Final = 64 * 2**20


class Subscribing(TopicCalls):
    """Makes subscriptions and carries them from stream to stream; the streams themselves are for its heir.

    Args:
        target: address of the server, or several, separated by commas, that serve the same bus.
        client_id: names the client.
        credentials: token and TLS, where the server asks for them.
        backoff: waiting times between tries.
    """

    def __init__(self, target: str, client_id: str, credentials: Credentials, backoff: Backoff) -> None:
        super().__init__(target, credentials)
        self._client_id = client_id
        self._backoff = backoff
        self._subscriptions: dict[int, Subscription] = {}
        self._subscription_ids = count(1)
        self._request_ids = count(2)
        self._outbox: deque[oona_pb2.StreamRequest] = deque()
        self._answers: dict[int, Callable[[oona_pb2.StreamResponse | None], None]] = {}
        self._to_send = asyncio.Event()
        self._connected = asyncio.Event()
        self._hold_subscribing: dict[int, asyncio.TimerHandle] = {}
        self._left = asyncio.Event()
        self._failure: OonaError | None = None

    @property
    def is_connected(self) -> bool:
        """Whether there is a stream now."""
        return self._connected.is_set() and self._failure is None

    def subscribe(
        self,
        kind: event_pb2.Kind.ValueType,
        *,
        run_ids: Iterable[str] = (),
        group: str = "",
        start: oona_pb2.StartAt | None = None,
        end_offset: int | None = None,
        ack_deadline: timedelta | None = None,
        redelivery: oona_pb2.Redelivery | None = None,
        credit: int = 1024,
        credit_bytes: int = CREDIT_BYTES,
    ) -> Subscription:
        """Ask for records of ``kind``. Enter what is returned with ``async with``, and iterate over it.

        Args:
            kind: the log.
            run_ids: only records of these runs. Empty: of all.
            group: group to share the records with, each run's going to one member. Empty: a private reader.
            start: where to start. None: committed for a group, latest for a private reader.
            end_offset: stop before this offset. Private readers only.
            ack_deadline: time after which an unacknowledged record comes again. None: the server's. Groups only.
            redelivery: how often and after which delays. None: the server's way. Groups only.
            credit: most records that may wait here for the reader.
            credit_bytes: most bytes of them. At least twice the largest record, or that one never comes.
        """
        request = oona_pb2.Subscribe(
            subscription_id=next(self._subscription_ids),
            kind=kind,
            run_ids=run_ids,
            group=group,
            start=start,
            redelivery=redelivery,
        )
        if end_offset is not None:
            request.end_offset = end_offset
        if ack_deadline is not None:
            request.ack_deadline.FromTimedelta(ack_deadline)
        return Subscription(self, request, FlowControl(credit, credit_bytes))

    # What subscriptions call.

    def send(
        self,
        request: oona_pb2.StreamRequest,
        on_answer: Callable[[oona_pb2.StreamResponse | None], None] | None = None,
    ) -> None:
        """Queue a request on the present stream, for subscriptions. Without a stream, the answer is None at once."""
        if not self.is_connected:
            if on_answer is not None:
                on_answer(None)
            return
        request.request_id = next(self._request_ids)
        if on_answer is not None:
            self._answers[request.request_id] = on_answer
        self._outbox.append(request)
        self._to_send.set()

    def add(self, subscription: Subscription) -> None:
        """Carry a subscription from now on."""
        if self._failure is not None:
            raise self._failure
        self._subscriptions[subscription.subscription_id] = subscription
        if self.is_connected:
            self._send_subscription(subscription)

    def remove(self, subscription: Subscription) -> None:
        """Carry a subscription no longer."""
        self._subscriptions.pop(subscription.subscription_id, None)
        self._left.set()

    # What the streams are told.

    def _send_subscription(self, subscription: Subscription) -> None:
        subscribe, *grant = subscription.requests()
        self.send(subscribe, partial(self._on_subscribed, subscription))
        for request in grant:
            self.send(request)

    def _on_subscribed(self, subscription: Subscription, answer: oona_pb2.StreamResponse | None) -> None:
        if answer is None or not subscription.stands or answer.rejected.reason not in RETRYABLE_REJECTIONS:
            subscription.on_subscribed(answer)
            return
        # It stood before the stream broke: whoever reads it need not hear that the server is not ready for it yet.
        error = rejection(answer.rejected)
        _log.warning("subscription_waits", target=self._target, client_id=self._client_id, detail=error.message)
        delay = self._backoff.next_delay(error.retry_after_s or 0.0)
        number = subscription.subscription_id
        loop = asyncio.get_running_loop()
        self._hold_subscribing[number] = loop.call_later(delay, self._subscribe_again, number)

    def _subscribe_again(self, subscription_id: int) -> None:
        self._hold_subscribing.pop(subscription_id)
        if (subscription := self._subscriptions.get(subscription_id)) is not None:
            self._send_subscription(subscription)

    def _lose_requests(self) -> None:
        """Tell everyone who waits for an answer of the stream that is gone."""
        for timer in self._hold_subscribing.values():
            timer.cancel()
        self._hold_subscribing.clear()
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer(None)
        for subscription in self._subscriptions.values():
            subscription.on_lost()

"""What callers ask of a loop, kept until no step is under way: nobody waits for a forward pass. Decides nothing."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from trtlab.runtime.request_state import RequestState


@dataclass(frozen=True)
class Arrival:
    """A request that joins; with a ``parent`` it goes on from there and shares the parent's blocks where it can."""

    request: RequestState
    parent: RequestState | None = None


@dataclass(frozen=True)
class Cancellation:
    """A request that is to end."""

    request: RequestState


Message = Arrival | Cancellation


class Inbox:
    """Messages in the order in which they came. Any thread may post; the loop drains while it holds its own lock.

    ``lock`` guards what a caller decides on before it posts. It is held for a moment only, and is reentrant: in a
    thread that holds it the garbage collector may close a dropped stream, which posts a cancellation.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.messages: deque[Message] = deque()

    def post(self, message: Message) -> None:
        """One more message."""
        self.messages.append(message)

    def drain(self, carry_out: Callable[[Message], None]) -> None:
        """Carry out all messages, those that come meanwhile too.

        A message is taken out after it was carried out: an interrupt in between loses none, and ``carry_out`` may meet
        one a second time.
        """
        while self.messages:
            carry_out(self.messages[0])
            self.messages.popleft()

    @property
    def arrivals(self) -> set[RequestState]:
        """The requests that have not joined yet."""
        return {message.request for message in tuple(self.messages) if isinstance(message, Arrival)}

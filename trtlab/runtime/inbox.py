"""Keeps callers' messages to a loop until no step is under way, so that no caller waits. Decides nothing."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from trtlab.runtime.request_state import RequestState


@dataclass(frozen=True)
class Arrival:
    """A request to queue; with a ``parent`` it is a fork, which shares the parent's blocks where it can."""

    request: RequestState
    parent: RequestState | None = None


@dataclass(frozen=True)
class Cancellation:
    """A request to end."""

    request: RequestState


Message = Arrival | Cancellation


class Inbox:
    """Messages in the order in which they came. Any thread may post; the loop drains while it holds its own lock.

    ``lock`` guards the state that a caller checks before it posts. It is held for a moment only, and is reentrant: in a
    thread that holds it the garbage collector may close a dropped stream, which posts a cancellation.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.messages: deque[Message] = deque()

    def post(self, message: Message) -> None:
        """Append a message."""
        self.messages.append(message)

    def drain(self, carry_out: Callable[[Message], None]) -> None:
        """Carry out all messages, also those that arrive meanwhile.

        A message is removed after it was carried out. An interrupt in between thus loses no message, but
        ``carry_out`` may get the same message a second time.
        """
        while self.messages:
            carry_out(self.messages[0])
            self.messages.popleft()

    @property
    def arrivals(self) -> set[RequestState]:
        """The requests that are not queued yet."""
        return {message.request for message in tuple(self.messages) if isinstance(message, Arrival)}

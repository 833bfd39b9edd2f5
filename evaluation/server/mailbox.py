"""The way of a job's events from the worker's thread to the request's coroutine."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request

from evaluation.server.work import Done, Event, Failed

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


class Mailbox:
    """A queue of events. It must be made in the coroutine that reads it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def send(self, event: Event) -> None:
        """Put an event in; called from another thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """The events as they come, up to the last."""
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, Done | Failed):
                return


async def unless_gone(request: Request, waiting: Coroutine[Any, Any, T]) -> T:
    """The result of `waiting`, if the client stays until then; the request's body must have been read.

    Raises:
        ClientGone: the client left first.
    """
    answer, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""Streams that nobody closes: their connection goes back once the task that read them was cancelled."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Generic, Self, TypeVar

Batch = TypeVar("Batch")

_closing: set[asyncio.Task[Any]] = set()


class StreamReader(Generic[Batch]):
    """The reader's end of a stream: closes it when its block ends, or once the task that reads it was cancelled.

    A generator that is dropped halfway is closed when it is garbage (PEP 533). Starlette drops one so: when a client
    goes, it cancels the task that sends the response, and the exception's traceback keeps the generator alive until
    some full collection. A connection cannot wait for that.

    Args:
        batches: the stream, not begun; nobody else reads it.
    """

    def __init__(self, batches: AsyncGenerator[Batch, None]) -> None:
        self._batches = batches
        self._task: asyncio.Task[Any] | None = None
        self._is_abandoned = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._watch(None)
        await self._batches.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        task = asyncio.current_task()
        if task is not self._task:
            self._watch(task)
        try:
            return await anext(self._batches)
        except StopAsyncIteration:
            if self._is_abandoned:
                raise RuntimeError("the stream is closed: the task that read it was cancelled") from None
            raise

    def _watch(self, task: asyncio.Task[Any] | None) -> None:
        if self._task is not None:
            self._task.remove_done_callback(self._ended)
        self._task = task
        if task is not None:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        # One that ended otherwise may have handed the stream on, as wait_for(anext(stream)) does before Python 3.12.
        if task.cancelled() and not getattr(self._batches, "ag_running", False):
            self._is_abandoned = True
            closing = asyncio.ensure_future(self._batches.aclose())
            _closing.add(closing)
            closing.add_done_callback(_closing.discard)

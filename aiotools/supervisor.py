"""A scope that keeps its children going."""

from __future__ import annotations

import contextvars

from ._policies import Retry, Statistics
from .taskscope import TaskScope

__all__ = (
    "Retry",
    "Statistics",
    "Supervisor",
)


class Supervisor(TaskScope):
    """A :class:`TaskScope` that drops the failures of its children.

    Parameters:
        context: the :class:`contextvars.Context` of all children; by default a copy each.

    A failing child disturbs nobody; use callbacks of its task to look at it, or let
    the supervisor restart it: ``create_task(factory, restart=Retry(...))``, where
    *factory* is a callable that returns a new coroutine for each attempt.
    :meth:`statistics` counts what happened.

    The idea is Erlang's. Since aiotools 2.0; policies and statistics since 3.0.
    """

    def __init__(self, context: contextvars.Context | None = None) -> None:
        super().__init__(exception_handler=None, context=context)
        self._statistics = _Counters()

    def create_task(self, coro, *, name=None, context=None, **kwargs):  # type: ignore[no-untyped-def]
        task = super().create_task(coro, name=name, context=context, **kwargs)
        self._statistics.add(task)  # type: ignore[no-untyped-call]
        return task

    create_task.__doc__ = TaskScope.create_task.__doc__

    def statistics(self) -> Statistics:
        """How many children are active, are done, have failed, and were started anew."""
        counters = self._statistics
        return Statistics(len(self._tasks), counters.done, counters.failed, counters.restarted)


class _Counters:
    __slots__ = ("__weakref__", "done", "failed", "restarted")

    def __init__(self) -> None:
        self.done = self.failed = self.restarted = 0

    def add(self, task):  # type: ignore[no-untyped-def]
        task.add_done_callback(self.count)

    def count(self, task):  # type: ignore[no-untyped-def]
        self.done += 1
        if not task.cancelled() and task.exception() is not None:
            self.failed += 1

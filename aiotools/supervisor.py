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
        self._restarted = 0

    def statistics(self) -> Statistics:
        """How many children are active, are done, have failed, and were started anew."""
        return Statistics(len(self._tasks), self._n_done, self._n_failed, self._restarted)

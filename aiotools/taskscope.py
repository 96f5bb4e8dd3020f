"""Blocks that wait for their child tasks, shields, and blocks that end after a while."""

from __future__ import annotations

import types

from ._aiotools import ShieldScope, TaskScope

__all__ = (
    "ShieldScope",
    "TaskScope",
    "move_on_after",
)


class move_on_after:
    """A :class:`TaskScope` that ends after a while without an error: ``async with move_on_after(5) as scope``.

    Parameters:
        timeout: seconds from entry; ``None`` is for ever.
        shield: hold off cancellations from outside until the block is left.

    On expiry the children and the body are cancelled, and the program goes on after
    the block. A :exc:`TimeoutError` that the body raises itself comes through.

    The idea is Trio's. Since aiotools 2.1.
    """

    __slots__ = ("_scope", "_shield", "_timeout")

    def __init__(self, timeout: float | None = None, shield: bool = False) -> None:
        self._timeout = timeout
        self._shield = shield
        self._scope: TaskScope | None = None

    async def __aenter__(self) -> TaskScope:
        if self._scope is not None:
            raise RuntimeError("move_on_after() has already been entered")
        self._scope = TaskScope(timeout=self._timeout, shield=self._shield)
        return await self._scope.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: types.TracebackType | None,
    ) -> bool | None:
        scope = self._scope
        if scope is None:
            raise RuntimeError("move_on_after() has not been entered")
        try:
            return await scope.__aexit__(exc_type, exc, tb)
        except TimeoutError as error:
            # Ours is made by the scope; the body's own passes without being raised anew.
            if scope._expired and error is not exc:
                return True
            raise

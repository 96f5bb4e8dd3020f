import sys
from collections.abc import Awaitable, Coroutine
from typing import get_args

from aiotools import types


class TestTypes:
    def test_names(self):
        assert sorted(types.__all__) == [
            "AsyncClosable",
            "AwaitableLike",
            "CoroutineLike",
            "ExcInfo",
            "OptExcInfo",
        ]

    def test_async_closable_is_checked_by_its_method(self):
        class Closable:
            async def close(self):
                pass

        assert isinstance(Closable(), types.AsyncClosable)
        assert not isinstance(object(), types.AsyncClosable)

    def test_aliases_are_generic(self):
        awaitable, coroutine = types.AwaitableLike[int], types.CoroutineLike[int]
        if sys.version_info >= (3, 12):
            assert awaitable == Awaitable[int]
            assert get_args(coroutine)[-1] is int and coroutine.__origin__ is Coroutine
        else:
            assert Awaitable[int] in get_args(awaitable)
            assert any(arg.__origin__ is Coroutine for arg in get_args(coroutine))

    def test_exc_info_has_three_parts(self):
        assert len(get_args(types.ExcInfo)) == 3
        assert types.ExcInfo in get_args(types.OptExcInfo)

import inspect

import pytest

from aiotools.iter import aiter


async def numbers(n):
    for i in range(n):
        yield i


class Sequence:
    def __init__(self, *items):
        self.items = list(items)

    async def next(self):
        item = self.items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item


class TestAiter:
    async def test_with_one_argument_it_is_the_builtin(self):
        assert [i async for i in aiter(numbers(3))] == [0, 1, 2]
        source = numbers(1)
        assert aiter(source) is source
        await source.aclose()

    async def test_stops_before_the_sentinel(self):
        source = Sequence(1, 2, "end", 3)
        assert [i async for i in aiter(source.next, "end")] == [1, 2]
        assert source.items == [3]

    async def test_none_is_a_sentinel(self):
        assert [i async for i in aiter(Sequence(0, "", None).next, None)] == [0, ""]

    async def test_compares_by_equality(self):
        assert [i async for i in aiter(Sequence(1, 2.0).next, 2)] == [1]

    async def test_an_error_of_the_function_ends_the_iteration(self):
        iterator = aiter(Sequence(1, KeyError("x"), 2).next, None)
        assert await anext(iterator) == 1
        with pytest.raises(KeyError):
            await anext(iterator)
        with pytest.raises(StopAsyncIteration):
            await anext(iterator)

    async def test_an_error_of_the_comparison_goes_through(self):
        class Odd:
            def __eq__(self, other):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            [i async for i in aiter(Sequence(Odd()).next, 1)]

    async def test_is_an_async_generator_that_can_be_closed(self):
        iterator = aiter(Sequence(1, 2, 3).next, None)
        assert inspect.isasyncgen(iterator)
        assert await anext(iterator) == 1
        await iterator.aclose()

    def test_refuses_what_it_cannot_iterate(self):
        with pytest.raises(TypeError, match="async iterable"):
            aiter([1])
        with pytest.raises(TypeError, match="needs a callable, not 'int'"):
            aiter(1, None)
        with pytest.raises(TypeError):
            aiter()
        with pytest.raises(TypeError):
            aiter(numbers, 1, 2)

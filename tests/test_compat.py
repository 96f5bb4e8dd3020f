import asyncio

import pytest

from aiotools import compat


class TestCompat:
    def test_functions_of_asyncio_are_the_same_objects(self):
        assert compat.get_running_loop is asyncio.get_running_loop
        assert compat.all_tasks is asyncio.all_tasks
        assert sorted(compat.__all__) == [
            "all_tasks",
            "current_task",
            "get_running_loop",
            "set_task_name",
        ]

    async def test_current_task_is_the_running_one(self):
        assert compat.current_task() is asyncio.current_task()

    async def test_current_task_refuses_in_a_callback_of_the_loop(self):
        loop = asyncio.get_running_loop()
        seen = loop.create_future()

        def callback():
            try:
                compat.current_task()
            except BaseException as exc:
                seen.set_result(exc)

        loop.call_soon(callback)
        error = await seen
        assert type(error) is RuntimeError
        assert "not in a task" in str(error)

    def test_current_task_without_a_loop_lets_the_error_of_asyncio_through(self):
        with pytest.raises(RuntimeError, match="no running event loop"):
            compat.current_task()

    async def test_set_task_name_names_the_task(self):
        compat.set_task_name(asyncio.current_task(), "mine")
        assert asyncio.current_task().get_name() == "mine"

    async def test_set_task_name_leaves_the_name_if_it_is_none(self):
        before = asyncio.current_task().get_name()
        compat.set_task_name(asyncio.current_task(), None)
        assert asyncio.current_task().get_name() == before
        compat.set_task_name(object(), None)

    def test_set_task_name_warns_about_what_cannot_be_named(self):
        with pytest.warns(DeprecationWarning, match="'object' objects cannot be named"):
            compat.set_task_name(object(), "x")

    def test_an_error_inside_set_name_is_not_taken_for_its_absence(self):
        class Odd:
            def set_name(self, name):
                raise AttributeError("inner")

        with pytest.raises(AttributeError, match="inner"):
            compat.set_task_name(Odd(), "x")

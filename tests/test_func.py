import functools

from aiotools import func


class TestApartial:
    def test_is_functools_partial(self):
        assert func.apartial is functools.partial

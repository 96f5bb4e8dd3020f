"""Barriers: tasks, and processes, that wait for each other."""

from ._aiotools import Barrier

AsyncBarrier = Barrier

__all__ = ("AsyncBarrier", "Barrier")

"""Timers, and virtual time."""

from ._clock import VirtualClock

__all__ = ("VirtualClock",)

"""Helpers for functions."""

from __future__ import annotations

from functools import partial as apartial

__all__ = ("apartial",)

"""Benchmarks: ours beside asyncio and the rivals. `python -m benchmarks --help`."""

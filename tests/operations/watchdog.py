"""LoopWatchdog, records in shared memory, and the deadline of orphans."""

import signal

import aiotools
from aiotools import _aiotools
from aiotools.watchdog import LoopWatchdog
from operations import no_memory, operation


@operation("_Watchdog")
async def a_watchdog_that_sees_nothing():
    with LoopWatchdog(hang_timeout=60, signum=0):
        await aiotools.checkpoint()


@operation("_Watchdog")
async def beats_by_hand():
    core = _aiotools._Watchdog(print, 1, 1, 0, -1, 0, bytearray(64))
    core.start()
    core.beat()
    core.read()
    core.stop()


@operation("_Watchdog")
async def a_watchdog_that_is_dropped():
    core = _aiotools._Watchdog(print, 1, 1, 0, -1, 0, None)
    core.start()


@operation("_Watchdog")
def bad_parameters():
    for bad in [(0, 1, 1), (1, -1, 1), (1, 1, -1), ("1", 1, 1), (1, float("nan"), 1)]:
        try:
            _aiotools._Watchdog(print, *bad, -1, 0, None)
        except (TypeError, ValueError):
            pass
    try:
        _aiotools._Watchdog(print, 1, 1, 0, -1, 0, bytearray(47))
    except ValueError:
        pass


@operation("_end_after_signal", threads=False)
def deadlines():
    saved = signal.signal(signal.SIGURG, lambda signum, frame: None)
    _aiotools._end_after_signal(signal.SIGURG, 3600)
    signal.signal(signal.SIGURG, saved)
    for bad in [(0, 1), (signal.SIGURG, 0), (signal.SIGURG, float("nan")), (signal.SIGURG, "1")]:
        try:
            _aiotools._end_after_signal(*bad)
        except (OSError, TypeError, ValueError):
            pass


@operation("_word_swap")
def words():
    page = bytearray(64)
    assert _aiotools._word_swap(page, 7, 0, 5)
    assert not _aiotools._word_swap(page, 7, 0, 6)
    try:
        _aiotools._word_swap(page, 8, 0, 5)
    except IndexError:
        pass


@operation("_record_read", "_record_write")
def records():
    record = bytearray(64)
    _aiotools._record_write(record, b"contents")
    assert _aiotools._record_read(record)[:8] == b"contents"
    for bad in (bytearray(8), b"x" * 64):
        try:
            _aiotools._record_write(bad, b"too much for it")
        except (ValueError, BufferError):
            pass


@no_memory("_Watchdog", "_record_read", "_record_write", "_word_swap")
async def starting_a_watchdog(fail):
    record = bytearray(64)
    core = None
    try:
        with fail:
            core = _aiotools._Watchdog(print, 1, 1, 0, -1, 0, None)
            try:
                core.start()
            except RuntimeError as exc:  # as threading says it when there is no memory for a thread
                raise MemoryError from exc
            core.beat()
            core.read()
            _aiotools._record_write(record, b"contents")
            _aiotools._record_read(record)
            _aiotools._word_swap(record, 0, 2, 4)
    finally:
        if core is not None:
            core.stop()

"""Logging of a server: the records of all workers and extras go to the handlers of the parent.

Why not every process for itself: lines of several writers get mixed up or torn, each process has to be told
when a file is rotated, and what a dying process has not written is lost.  Here a process hands over a record before the
logging call returns, so nothing is lost with it; and there is one writer for each file.

How
    Each process has a pipe of its own to the parent.  A :class:`RecordHandler` (a :class:`logging.handlers.QueueHandler`)
    writes records to it, in pieces of at most ``PIPE_BUF`` bytes, which the kernel keeps whole whoever else
    writes (a child that the worker has forked, for one) and whenever the process is killed.  In the parent a
    :class:`logging.handlers.QueueListener` in its thread reads all pipes and passes the records to the handlers
    of the loggers that they were logged to.

    Contents travel as JSON, so a worker with fewer rights than the parent has no way to run code there.

Every record has ``process_index``, ``generation`` and ``role`` (``"worker"``, ``"extra"``, ``"main"``), beside ``process``
(the process id) and ``processName``.

A parent that does not read (its handlers block) makes logging calls wait for up to :data:`PATIENCE` seconds; what cannot be
handed over then is dropped and counted, and the count is logged as soon as there is room.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import datetime
import json
import logging
import logging.config
import logging.handlers
import os
import select
import selectors
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..fork import keep_from_children
from .plugins import ServerPlugin, WorkerPlugin
from .worker import current_worker, process_index

if TYPE_CHECKING:
    from .child import Child
    from .supervise import Supervisor
    from .worker import Worker

__all__ = ("JSONFormatter", "LogConfig", "LogServer", "RecordHandler", "TEXT_FORMAT", "setup")

#: The format of text lines.
TEXT_FORMAT = (
    "%(asctime)s %(levelname)s [%(role)s %(process_index)s, pid %(process)d, gen %(generation)s] %(name)s: %(message)s"
)
#: Seconds that a logging call waits for a parent that does not read.
PATIENCE = 5.0

#: What a pipe keeps whole; POSIX promises 512.
PIPE_BUF = getattr(select, "PIPE_BUF", 512)
#: Each piece: writer, is it the first of its record, is it the last, length of what follows.
_HEADER = struct.Struct("=Q??H")
#: What a pipe should hold, so that bursts do not wait.
_PIPE_SIZE = 1 << 20

#: The attributes of a plain record, which are not "extra".
_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_OURS = ("process_index", "generation", "role")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How a server logs.

    :param format: ``"text"``, ``"json"``, or a ``%``-style format string.
    :param level: level of the root logger, in all processes.
    :param levels: levels of further loggers, by name.
    :param file: path of the file that is appended to; default: standard error.
    :param per_process: path of a file per process, with ``{role}`` and ``{index}`` (and, if wanted, ``{generation}``
        and ``{pid}``) in it; *file* then gets everything as well if it is given, and standard error nothing.
    """

    format: str = "text"
    level: int | str = logging.INFO
    levels: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    file: Any = None
    per_process: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.format, str):
            raise TypeError(f"format must be 'text', 'json' or a format string, not {self.format!r}")
        if self.format not in ("text", "json"):
            logging.PercentStyle(self.format).validate()
        for name, level in {"level": self.level, **self.levels}.items():
            if logging._checkLevel(level) is None:  # type: ignore[attr-defined]
                raise ValueError(f"{name}: {level!r} is no level")
        if self.per_process is not None:
            try:
                found = {self.per_process.format(role=r, index=i, generation=0, pid=0) for r in "we" for i in range(2)}
            except (KeyError, IndexError) as exc:
                raise ValueError(f"per_process: unknown field {exc} in {self.per_process!r}") from None
            if len(found) < 2 or "{index}" not in self.per_process:
                raise ValueError(f"per_process must have {{index}} in it: {self.per_process!r}")

    def formatter(self) -> logging.Formatter:
        """A new formatter for :attr:`format`."""
        if self.format == "json":
            return JSONFormatter()
        return logging.Formatter(TEXT_FORMAT if self.format == "text" else self.format)


class JSONFormatter(logging.Formatter):
    """One JSON object per line: ``time level logger message role process_index pid generation``, the exception and stack
    as text if there are any, and whatever was given as ``extra=``."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        facts: dict[str, Any] = {
            "time": time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "role": getattr(record, "role", None),
            "process_index": getattr(record, "process_index", None),
            "pid": record.process,
            "generation": getattr(record, "generation", None),
        }
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            facts["exception"] = record.exc_text
        if record.stack_info:
            facts["stack"] = self.formatStack(record.stack_info)
        for name, value in record.__dict__.items():
            if name not in _PLAIN and name not in _OURS:
                facts.setdefault(name, value)
        return json.dumps(facts, default=repr, ensure_ascii=False)


class _Origin(logging.Filter):
    """Gives records of the parent itself, and of workers in its threads, what those of the children have."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "process_index"):
            try:
                worker = current_worker()
            except LookupError:
                record.process_index, record.generation, record.role = process_index.get(None), None, "main"
            else:
                record.process_index, record.generation, record.role = worker.index, worker.generation, worker.role
        return True


def _file_handler(path: Any) -> logging.FileHandler:
    # What has no encoding is shown somehow rather than lost.
    return logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")


class _PerProcessHandler(logging.Handler):
    """A file for each process."""

    def __init__(self, template: str) -> None:
        super().__init__()
        self._template = template
        self._files: dict[str, logging.FileHandler] = {}

    def _path(self, record: logging.LogRecord) -> str:
        facts = record.__dict__
        index = "main" if facts["role"] == "main" else facts["process_index"]
        return self._template.format(
            role=facts["role"], index=index, generation=facts["generation"], pid=record.process
        )

    def emit(self, record: logging.LogRecord) -> None:
        try:
            path = self._path(record)
            handler = self._files.get(path)
            if handler is None:
                handler = self._files[path] = _file_handler(path)
            handler.setFormatter(self.formatter)
            handler.emit(record)
        except Exception:
            self.handleError(record)

    def reopen(self) -> None:
        self.acquire()
        try:
            for handler in self._files.values():
                _close(handler)
            # Each is opened again when it is written to; those of processes that are gone stay closed.
            self._files.clear()
        finally:
            self.release()

    def close(self) -> None:
        self.reopen()
        super().close()


def _close(handler: logging.Handler) -> None:
    """Close *handler*; what its file does not take (the disk is full) was complained of when it was logged."""
    with contextlib.suppress(OSError):
        handler.close()


def _reopen(handler: logging.Handler) -> None:
    """Have *handler* open its file anew, if it has one."""
    if isinstance(handler, _PerProcessHandler):
        handler.reopen()
    elif isinstance(handler, logging.FileHandler):
        handler.acquire()
        try:
            if handler.stream is not None:
                stream, handler.stream = handler.stream, None
                with contextlib.suppress(OSError):
                    stream.close()
                # At once: a log that stays silent is to be there as well.
                handler.stream = handler._open()
        finally:
            handler.release()


def all_handlers() -> Iterator[logging.Handler]:
    """Those of all loggers of this process, each once."""
    seen = set()
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in list(getattr(logger, "handlers", ())):
            if id(handler) not in seen:
                seen.add(id(handler))
                yield handler


class _Installed:
    """The handlers of a :class:`LogConfig` on the root logger of this process."""

    def __init__(self, config: LogConfig) -> None:
        root = logging.getLogger()
        self._before = root.level
        self._levels = {name: logging.getLogger(name).level for name in config.levels}
        self._handlers: list[logging.Handler] = []
        try:
            if config.per_process is not None:
                self._handlers.append(_PerProcessHandler(config.per_process))
            if config.file is not None:
                self._handlers.append(_file_handler(config.file))
            elif config.per_process is None:
                self._handlers.append(logging.StreamHandler(sys.stderr))
        except BaseException:
            self._close()
            raise
        for handler in self._handlers:
            handler.setFormatter(config.formatter())
            handler.addFilter(_Origin())
            root.addHandler(handler)
        root.setLevel(config.level)
        for name, level in config.levels.items():
            logging.getLogger(name).setLevel(level)

    def _close(self) -> None:
        for handler in self._handlers:
            _close(handler)

    def remove(self) -> None:
        root = logging.getLogger()
        for handler in self._handlers:
            root.removeHandler(handler)
        self._close()
        root.setLevel(self._before)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)


class _SetUp(LogConfig):
    """A LogConfig whose handlers are installed already, and stay."""


def setup(
    format: str = "text",
    *,
    level: int | str = logging.INFO,
    levels: Mapping[str, int | str] | None = None,
    file: Any = None,
    per_process: str | None = None,
) -> LogConfig:
    """Set up the logging of this process at once, and of a server later: ``start_server(..., log_config=setup("json"))``.

    Parameters: see :class:`LogConfig`.  To be called in the parent, once; the handlers stay.

    :returns: what ``log_config=`` takes.
    :raises ValueError: a parameter that cannot be.
    :raises OSError: *file* cannot be opened.
    """
    config = _SetUp(format=format, level=level, levels=dict(levels or {}), file=file, per_process=per_process)
    _Installed(config)
    return config


# In the children


class RecordPipe:
    """The queue of a :class:`RecordHandler`: the writing end of a pipe.  ``put_nowait`` takes a dict."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)
        self.lost = 0
        self._writer = 0
        self._pid = -1

    def put_nowait(self, facts: dict[str, Any]) -> None:
        pid = os.getpid()
        if pid != self._pid:
            # Also in a process that was forked from this one.
            self._pid = pid
            self._writer = int.from_bytes(os.urandom(8), "little")
        if self.lost:
            facts = {**facts, "_lost": self.lost}
        data = json.dumps(facts, default=repr).encode(errors="backslashreplace")
        room = PIPE_BUF - _HEADER.size
        for start in range(0, len(data), room):
            piece = data[start : start + room]
            header = _HEADER.pack(self._writer, start == 0, start + room >= len(data), len(piece))
            if not self._write(header + piece):
                self.lost += 1
                return
        self.lost = 0

    def _write(self, piece: bytes) -> bool:
        poll = None
        while True:
            try:
                os.write(self.fd, piece)  # all of it or nothing
                return True
            except BlockingIOError:
                # After one wait in vain the next calls do not wait at all.
                if poll is None and not self.lost:
                    poll = select.poll()
                    poll.register(self.fd, select.POLLOUT)
                if poll is None or not poll.poll(PATIENCE * 1000):
                    return False
            except OSError:
                return False  # the parent is gone


class RecordHandler(logging.handlers.QueueHandler):
    """Hands records over to the parent.

    :param fd: the writing end of the pipe, which the handler owns.
    :param facts: what is added to each record.
    """

    def __init__(self, fd: int, facts: dict[str, Any]) -> None:
        super().__init__(RecordPipe(fd))  # type: ignore[arg-type]
        self._facts = facts

    def prepare(self, record: logging.LogRecord) -> Any:
        """The record as a dict, with its message and the text of its exception made here, where their objects are."""
        message = record.getMessage()
        if record.exc_info and not record.exc_text:
            record = copy.copy(record)
            record.exc_text = logging.Formatter().formatException(record.exc_info)  # type: ignore[arg-type]
        facts = {**record.__dict__, **self._facts}
        facts.update(msg=message, args=None, exc_info=None)
        facts.pop("message", None)
        return facts

    def close(self) -> None:
        super().close()
        if self.queue is not None:
            os.close(self.queue.fd)  # type: ignore[attr-defined]
            self.queue = None  # type: ignore[assignment]


class _LogPlugin(WorkerPlugin):
    """Sets up the logging of a child."""

    def __init__(self, end: Any, level: int | str, levels: dict[str, int | str]) -> None:
        self._end = end  # a connection, or the number of a descriptor in this process
        self._level = level
        self._levels = levels
        self._kept: list[Any] = []
        self._handler: RecordHandler | None = None

    def __getstate__(self) -> Any:
        return self._end, self._level, self._levels

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def boot(self, worker: Worker) -> None:
        root = logging.getLogger()
        loggers = [root, *(x for x in logging.Logger.manager.loggerDict.values() if isinstance(x, logging.Logger))]
        for logger in loggers:
            # A forked process has the parent's; they are neither used nor closed: what is in their buffers is the parent's.
            self._kept += logger.handlers
            logger.handlers = []
            logger.propagate = True
        if isinstance(self._end, int):
            fd = self._end
        else:
            fd = os.dup(self._end.fileno())
            self._end.close()
        facts = {"process_index": worker.index, "generation": worker.generation, "role": worker.role}
        self._handler = RecordHandler(fd, facts)
        root.addHandler(self._handler)
        root.setLevel(self._level)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)

    def exit(self, worker: Worker) -> None:
        # In a process it stays to the very end.
        if worker.kind == "interpreter" and self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()


# In the parent


class RecordQueue:
    """The queue of the listener: records from any number of pipes, those of each in their order."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = socket.socketpair()
        for end in (self._wake_r, self._wake_w):
            end.setblocking(False)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._new: collections.deque[Any] = collections.deque()
        self._finished: collections.deque[Any] = collections.deque()
        self._found: collections.deque[Any] = collections.deque()
        self._sentinels: collections.deque[Any] = collections.deque()

    def _wake(self) -> None:
        try:
            self._wake_w.send(b".")
        except BlockingIOError:
            pass

    def add(self, end: Any) -> None:
        """Read from *end*, a connection that belongs to the queue from now on; any thread."""
        os.set_blocking(end.fileno(), False)
        self._new.append(end)
        self._wake()

    def finish(self, end: Any) -> None:
        """Read what is in *end* and close it, whoever else may write to it; any thread."""
        self._finished.append(end)
        self._wake()

    def put_nowait(self, sentinel: Any) -> None:
        """Have :meth:`get` return *sentinel* when all that has arrived is read."""
        self._sentinels.append(sentinel)
        self._wake()

    def get(self, block: bool = True) -> Any:
        while not self._found:
            ready = self._look(None if block and not self._sentinels else 0)
            if not ready and not self._new and self._sentinels and not self._found:
                return self._sentinels.popleft()
        return self._found.popleft()

    def _look(self, timeout: float | None) -> bool:
        """Read once from all that is ready; says whether anything was."""
        while self._new:
            self._selector.register(self._new.popleft(), selectors.EVENT_READ, _Assembler())
            timeout = 0
        ready = False
        for key, _ in self._selector.select(timeout):
            ready = True
            if key.data is None:
                try:
                    self._wake_r.recv(4096)
                except BlockingIOError:
                    pass
                continue
            self._read(key)
        while self._finished:
            end = self._finished.popleft()
            if not end.closed:
                key = self._selector.get_key(end)
                while self._read(key):
                    pass
                if not end.closed:
                    self._drop(end)
        return ready

    def _read(self, key: selectors.SelectorKey) -> bool:
        try:
            data = os.read(key.fd, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            self._found += key.data.feed(data)
        else:
            self._drop(key.fileobj)
        return bool(data)

    def _drop(self, end: Any) -> None:
        self._selector.unregister(end)
        end.close()

    def close(self) -> None:
        """Close all pipes; only when the listener has ended."""
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.fileobj.close()  # type: ignore[union-attr]
        for end in self._new:
            end.close()
        self._selector.close()
        self._wake_r.close()
        self._wake_w.close()


class _Assembler:
    """Records from the bytes of one pipe."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._parts: dict[int, bytearray] = {}

    def feed(self, data: bytes) -> list[logging.LogRecord]:
        self._bytes += data
        found: list[logging.LogRecord] = []
        while len(self._bytes) >= _HEADER.size:
            writer, first, last, length = _HEADER.unpack_from(self._bytes)
            end = _HEADER.size + length
            if len(self._bytes) < end:
                break
            # A first piece after an unfinished record: the rest of that could not be handed over.
            part = bytearray() if first else self._parts.pop(writer, None)
            if part is not None:
                part += self._bytes[_HEADER.size : end]
                if last:
                    found += self._records(part)
                else:
                    self._parts[writer] = part
            del self._bytes[:end]
        return found

    @staticmethod
    def _records(data: bytes | bytearray) -> Iterator[logging.LogRecord]:
        facts = json.loads(data)
        lost = facts.pop("_lost", 0)
        if lost:
            note = {
                "name": __package__,
                "levelno": logging.WARNING,
                "levelname": "WARNING",
                "msg": f"{lost} log records were lost: they could not be handed over in time",
            }
            keep = ("process", "processName", *_OURS, "created", "msecs")
            yield logging.makeLogRecord({k: v for k, v in facts.items() if k in keep} | note)
        yield logging.makeLogRecord(facts)


class _Listener(logging.handlers.QueueListener):
    def handle(self, record: logging.LogRecord) -> None:
        """To the handlers of its logger, as if it had been logged here; its level was looked at where it was logged."""
        try:
            logging.getLogger(record.name).callHandlers(record)
        except Exception:
            # A handler's failure is the handler's affair (logging.raiseExceptions); this is a filter's or our own.
            if logging.raiseExceptions and sys.stderr:
                sys.excepthook(*sys.exc_info())


class LogServer(ServerPlugin):
    """Brings the records of all children to the handlers of this process.

    :param config: a :class:`LogConfig`, which is installed while the server runs unless :func:`setup` has done so; a dict
        for :func:`logging.config.dictConfig`, applied when the server starts; or ``True``: with the handlers and
        levels that this process has.
    :raises TypeError, ValueError: anything else.
    """

    def __init__(self, config: Any = True) -> None:
        if isinstance(config, str):
            config = LogConfig(format=config)
        if config is not True and not isinstance(config, (LogConfig, Mapping)):
            raise TypeError(f"log_config must be a LogConfig, a dict for dictConfig, a format or True, not {config!r}")
        self._config = config
        self._installed: _Installed | None = None
        self._origins: list[tuple[logging.Handler, logging.Filter]] = []
        self._queue: RecordQueue | None = None
        self._listener: _Listener | None = None
        self._writers: dict[Child, Any] = {}
        self._readers: dict[Child, Any] = {}
        self._sup: Supervisor | None = None

    def open(self, sup: Supervisor) -> None:
        self._sup = sup
        config = self._config
        if isinstance(config, LogConfig):
            if not isinstance(config, _SetUp):
                self._installed = _Installed(config)
        elif config is not True:
            logging.config.dictConfig(dict(config))
        for handler in all_handlers():
            if not any(isinstance(f, _Origin) for f in handler.filters):
                origin = _Origin()
                handler.addFilter(origin)
                self._origins.append((handler, origin))
        self._queue = keep_from_children(RecordQueue())
        self._listener = _Listener(self._queue)
        self._listener.start()

    def _levels(self) -> tuple[int, dict[str, int | str]]:
        """The levels of this process, which the children are to have."""
        found: dict[str, int | str] = {
            name: logger.level
            for name, logger in logging.Logger.manager.loggerDict.items()
            if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET
        }
        return logging.getLogger().level, found

    def child_plugin(self, child: Child) -> WorkerPlugin | None:
        if child.kind == "thread":
            return None  # it has the same handlers
        assert self._sup is not None and self._queue is not None
        reader, writer = self._sup.mp_context.Pipe(duplex=False)
        _enlarge(writer.fileno())
        level, levels = self._levels()
        if child.kind == "interpreter":
            end = os.dup(writer.fileno())
            writer.close()
        else:
            end = self._writers[child] = writer
        self._readers[child] = reader
        self._queue.add(reader)
        return _LogPlugin(end, level, levels)

    def child_event(self, child: Child, event: str) -> None:
        if event in ("ready", "draining", "gone"):
            self._forget(child)
        if event == "gone":
            self._finish(child)

    def _forget(self, child: Child) -> None:
        writer = self._writers.pop(child, None)
        if writer is not None:
            writer.close()

    def _finish(self, child: Child) -> None:
        # A process that was forked meanwhile may hold the writing end, so that the end of file would not come.
        reader = self._readers.pop(child, None)
        if reader is not None and self._queue is not None:
            self._queue.finish(reader)

    def tick(self, now: float) -> None:
        for child in list(self._readers):
            if child.state.value == "gone":  # its start failed
                self._forget(child)
                self._finish(child)

    def server_event(self, event: str, **facts: Any) -> None:
        if event == "reload":
            self.reopen()

    def reopen(self) -> None:
        """Open all log files anew (after they were renamed)."""
        for handler in all_handlers():
            try:
                _reopen(handler)
            except OSError:
                logging.getLogger(__package__).exception("Cannot reopen %r", handler)

    def close(self, sup: Supervisor) -> None:
        for child in list(self._writers):
            self._forget(child)
        if self._listener is not None:
            self._listener.stop()
        if self._queue is not None:
            self._queue.close()
        for handler, origin in self._origins:
            handler.removeFilter(origin)
        self._origins.clear()
        if self._installed is not None:
            self._installed.remove()


def _enlarge(fd: int) -> None:
    import fcntl

    if hasattr(fcntl, "F_SETPIPE_SZ"):
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            pass  # the user has used up what unprivileged pipes may take

"""The records of all processes of a server reach the parent's handlers, whole, in order, whatever happens."""

import io
import json
import logging
import os
import re
import signal
import sys

import pytest
import server_log_workers as workers
from process_helpers import START_METHODS, nothing_left_fixture  # noqa: F401
from server_play import Play, kill, script

from aiotools.server import LogConfig, logs

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(300)]

FAST = "fork" if "fork" in START_METHODS else "forkserver"


class Collector(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)

    def of(self, name, **facts):
        return [r for r in self.records if r.name == name and all(getattr(r, k, None) == v for k, v in facts.items())]


@pytest.fixture
def root():
    """The root logger, as it was afterwards."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield logger
    for handler in list(logger.handlers):
        if handler not in handlers:
            logger.removeHandler(handler)
            handler.close()
    logger.setLevel(level)


@pytest.fixture
def collector(root):
    handler = Collector()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    return handler


@pytest.fixture(params=[(m, r) for m in START_METHODS for r in ("default", "uvloop")], ids="-".join)
def play(request, nothing_left):
    play = Play(*request.param)
    with play.wire:
        yield play


@pytest.fixture
def quick(nothing_left):
    play = Play(FAST, "default")
    with play.wire:
        yield play


def quick_pid(play, index):
    """The process id that the worker with this index told."""
    return next(m[2] for m in play.said if m[0] == "logged" and m[1] == index)


def numbers(records):
    return [int(re.match(r"line (\d+)", r.getMessage())[1]) for r in records]


class TestWholeness:
    @pytest.mark.parametrize("how", ["stop", "kill"])
    def test_no_line_is_lost_torn_or_out_of_order(self, play, collector, how):
        lines = 150
        script(
            play, (lambda: play.count("logged") == 2, (lambda: None) if how == "kill" else lambda: kill(signal.SIGTERM))
        )
        play.start(workers.logging_worker, lines, how, num_workers=2, log_config=True)
        for index in range(2):
            for name in ("test.a", "test.b"):
                found = collector.of(name, process_index=index)
                assert numbers(found) == list(range(lines))
                for i, record in enumerate(found):
                    assert record.getMessage() == f"line {i} of {index} {'x' * (i % 7 * 2000)}"
                    assert record.generation == 1
                    assert record.role == "worker"
        pids = {m[1]: m[2] for m in play.said if m[0] == "logged"}
        assert {(r.process_index, r.process) for r in collector.of("test.a")} == set(pids.items())
        assert len(collector.of("test.end")) == (0 if how == "kill" else 2)

    def test_a_process_that_a_worker_forked_shares_its_pipe(self, collector, quick):
        if FAST != "fork":
            # A fork of a spawned process is as good.
            quick = Play("spawn", "default")
            quick.wire.__enter__()
        quick.stop_after("logged", 1)
        quick.start(workers.forking, log_config=True)
        for name in ("test.forked", "test.forker"):
            found = collector.of(name)
            assert numbers(found) == list(range(200))
            assert {len(r.getMessage()) for r in found} <= {len(f"line {i} ") + 9000 for i in (1, 10, 100)}

    def test_the_threads_of_the_parent_log_as_themselves(self, collector, quick):
        quick.stop_after("logged", 2)
        quick.start(workers.facts, num_workers=2, worker_kind="thread", log_config=True)
        found = collector.of("test.facts", levelno=logging.ERROR)
        assert sorted(r.process_index for r in found) == [0, 1]
        assert {r.process for r in found} == {os.getpid()}
        assert {r.generation for r in found} == {1}

    @pytest.mark.skipif(sys.version_info < (3, 14), reason="interpreters came with 3.14")
    def test_interpreters_log_to_the_parent(self, collector, tmp_path):
        play = Play(FAST, "default")
        with play.wire:
            play.on_event("ready", lambda: kill(signal.SIGTERM))
            play.start(
                "server_log_workers:quiet",
                main=play.main(wire=False),
                worker_kind="interpreter",
                plugins=[play.plugin],
                log_config=True,
            )
        [record] = collector.of("test.interpreter")
        assert (record.process_index, record.process, record.role) == (0, os.getpid(), "worker")

    def test_extras_log_to_the_parent_too(self, play, collector):
        play.stop_after("logged", 1)
        play.start(None, num_workers=0, extra_procs=[workers.extra], log_config=True)
        [record] = collector.of("test.extra")
        assert record.role == "extra"
        assert record.process_index == 0
        assert record.process == play.said[0][2]


class TestContents:
    def test_what_was_given_arrives(self, quick, collector):
        quick.stop_after("logged", 1)
        quick.start(workers.facts, log_config=True)
        info, error, where, odd = collector.of("test.facts")
        assert info.getMessage().startswith("with {'a': <object object at")
        assert info.user == "me"
        assert info.data == [1, {"k": "v"}]
        assert info.odd.startswith("<object object at")
        assert error.getMessage() == "it failed"
        assert "ValueError: the reason" in logging.Formatter().format(error)
        assert "in facts" in where.stack_info
        assert odd.getMessage() == "lone surrogate \udc80 and two\nlines"

    def test_the_parents_own_records_have_the_same_fields(self, quick, root):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(logs.TEXT_FORMAT))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        quick.on_event("ready", lambda: (logging.getLogger("test.parent").warning("it is me"), kill(signal.SIGTERM)))
        quick.start(workers.facts, plugins=[quick.plugin], log_config=True)
        assert f"WARNING [main None, pid {os.getpid()}, gen None] test.parent: it is me" in stream.getvalue()
        assert re.search(r"ERROR \[worker 0, pid \d+, gen 1\] test.facts: it failed", stream.getvalue())
        assert handler.filters == []

    def test_levels_of_the_parent_hold_in_the_children(self, quick, collector):
        logger = logging.getLogger("test.facts")
        logger.setLevel(logging.ERROR)
        try:
            quick.stop_after("logged", 1)
            quick.start(workers.facts, log_config=True)
        finally:
            logger.setLevel(logging.NOTSET)
        assert [r.levelname for r in collector.of("test.facts")] == ["ERROR"]

    def test_handlers_of_other_loggers_than_the_root_get_their_records(self, quick, collector):
        logger = logging.getLogger("test.facts")
        own = Collector()
        logger.addHandler(own)
        logger.propagate = False
        try:
            quick.stop_after("logged", 1)
            quick.start(workers.facts, log_config=True)
        finally:
            logger.removeHandler(own)
            logger.propagate = True
        assert len(own.records) == 4
        assert collector.of("test.facts") == []


class TestConfig:
    def test_json_lines_in_a_file(self, quick, tmp_path, root):
        path = tmp_path / "server.log"
        quick.stop_after("logged", 2)
        quick.start(workers.facts, num_workers=2, log_config=LogConfig(format="json", file=path))
        found = [json.loads(line) for line in path.read_text().splitlines()]
        found = [f for f in found if f["logger"] == "test.facts"]
        assert len(found) == 8
        for fact in found:
            assert fact["role"] == "worker"
            assert fact["generation"] == 1
            assert fact["pid"] == quick_pid(quick, fact["process_index"])
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", fact["time"])
        [error] = [f for f in found if f["level"] == "ERROR" and f["process_index"] == 1]
        assert error["exception"].endswith("ValueError: the reason")
        assert {f.get("user") for f in found} == {"me", None}

    def test_text_lines_on_standard_error(self, quick, root, capfd):
        quick.stop_after("logged", 1)
        quick.start(workers.facts, log_config="text")
        err = capfd.readouterr().err
        assert re.search(r"INFO \[worker 0, pid \d+, gen 1\] test.facts: with ", err)

    def test_a_file_per_process(self, quick, tmp_path, root):
        quick.on_event("ready", lambda: (logging.getLogger("test.parent").warning("it is me"), kill(signal.SIGTERM)))
        config = LogConfig(
            per_process=f"{tmp_path}/{{role}}-{{index}}.log", level="DEBUG", format="%(name)s %(message)s"
        )
        quick.start(workers.facts, num_workers=2, log_config=config, plugins=[quick.plugin])
        for index in range(2):
            text = (tmp_path / f"worker-{index}.log").read_text()
            assert text.count("test.facts it failed") == 1
            assert "not to be seen" in text
        assert "test.parent it is me" in (tmp_path / "main-main.log").read_text()

    def test_a_dict_for_dict_config(self, quick, tmp_path, root):
        path = tmp_path / "dict.log"
        config = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(process_index)s %(message)s"}},
            "handlers": {"file": {"class": "logging.FileHandler", "filename": str(path), "formatter": "plain"}},
            "root": {"level": "INFO", "handlers": ["file"]},
        }
        before = list(root.handlers)
        try:
            quick.stop_after("logged", 1)
            quick.start(workers.facts, log_config=config)
        finally:
            for handler in list(root.handlers):
                root.removeHandler(handler)
                handler.close()
            for handler in before:
                root.addHandler(handler)
        assert "0 it failed" in path.read_text()

    def test_setup_installs_at_once_and_start_server_uses_it(self, quick, tmp_path, root):
        path = tmp_path / "setup.log"
        config = logs.setup("%(process_index)s %(message)s", file=path, level="INFO")
        logging.getLogger("test.before").info("before")
        quick.stop_after("logged", 1)
        quick.start(workers.facts, log_config=config)
        logging.getLogger("test.after").info("after")
        lines = path.read_text().splitlines()
        assert lines[0] == "None before"
        assert lines[-1] == "None after"
        assert "0 it failed" in lines

    def test_the_handlers_are_gone_afterwards(self, quick, tmp_path, root):
        before = list(root.handlers), root.level, logging.getLogger("test.x").level
        quick.stop_after("logged", 1)
        config = LogConfig(file=tmp_path / "x.log", level="ERROR", levels={"test.x": "DEBUG"})
        quick.start(workers.facts, log_config=config)
        assert (list(root.handlers), root.level, logging.getLogger("test.x").level) == before

    @pytest.mark.parametrize(
        ("bad", "error", "match"),
        [
            ({"format": 1}, TypeError, "format"),
            ({"format": "no field"}, ValueError, "format"),
            ({"level": "LOUD"}, ValueError, "LOUD"),
            ({"levels": {"x": "LOUD"}}, ValueError, "LOUD"),
            ({"per_process": "one.log"}, ValueError, "index"),
            ({"per_process": "{what}-{index}.log"}, ValueError, "what"),
        ],
    )
    def test_a_config_that_cannot_be_is_refused(self, bad, error, match):
        with pytest.raises(error, match=match):
            LogConfig(**bad)

    def test_log_config_takes_no_other_objects(self, quick):
        with pytest.raises(TypeError, match="log_config"):
            quick.start(workers.facts, log_config=17)

    def test_a_file_that_cannot_be_opened_ends_the_start(self, quick, tmp_path, root):
        with pytest.raises(FileNotFoundError):
            quick.start(workers.facts, log_config=LogConfig(file=tmp_path / "no" / "such" / "folder.log"))
        assert quick.said == []


class TestReopening:
    @pytest.mark.parametrize("per_process", [False, True])
    def test_sigusr1_opens_renamed_files_anew(self, quick, tmp_path, root, per_process):
        go_r, go_w = quick.ctx.Pipe(duplex=False)
        path = tmp_path / ("worker-0.log" if per_process else "all.log")
        config = LogConfig(per_process=f"{tmp_path}/{{role}}-{{index}}.log") if per_process else LogConfig(file=path)

        def rotate():
            os.rename(path, tmp_path / "old.log")
            quick.on_event("reload", lambda: go_w.send("after the rotation"))
            kill(signal.SIGUSR1)

        def when_written(text, action):
            """Records come through another thread than the wire's messages."""

            def look():
                if path.exists() and text in path.read_text():
                    action()
                else:
                    quick.sup.loop.call_later(0.005, look)

            look()

        script(
            quick,
            (lambda: quick.count("logged") == 1, lambda: when_written("first from 0", rotate)),
            (lambda: quick.count("logged") == 2, lambda: kill(signal.SIGTERM)),
        )
        try:
            quick.start(workers.on_demand, go_r, log_config=config, plugins=[quick.plugin])
        finally:
            go_r.close()
            go_w.close()
        assert "first from 0" in (tmp_path / "old.log").read_text()
        assert "after the rotation" in path.read_text()
        assert "after the rotation" not in (tmp_path / "old.log").read_text()


class TestAssembling:
    """The protocol of the pipes, without a process."""

    @pytest.fixture
    def pipe(self, monkeypatch):
        monkeypatch.setattr(logs, "PATIENCE", 0.01)
        r, w = os.pipe()
        os.set_blocking(r, False)
        yield r, logs.RecordPipe(w)
        os.close(r)
        os.close(w)

    def feed(self, assembler, fd):
        found = []
        while True:
            try:
                data = os.read(fd, 777)
            except BlockingIOError:
                return found
            found += assembler.feed(data)

    def test_records_that_are_cut_anywhere_come_out_whole(self, pipe):
        fd, queue = pipe
        assembler = logs._Assembler()
        for size in (0, 1, logs.PIPE_BUF, 3 * logs.PIPE_BUF):
            queue.put_nowait({"msg": "m" * size, "name": "n"})
            assert [r.msg for r in self.feed(assembler, fd)] == ["m" * size]

    def test_a_record_whose_writer_died_in_the_middle_is_left_out(self, pipe):
        fd, queue = pipe
        assembler = logs._Assembler()
        whole = queue._write
        queue._write = lambda piece: whole(piece) if piece[8] else True
        queue.put_nowait({"msg": "m" * 3 * logs.PIPE_BUF})
        assert self.feed(assembler, fd) == []
        queue._write = whole
        queue.put_nowait({"msg": "whole"})
        assert [r.msg for r in self.feed(assembler, fd)] == ["whole"]

    def test_what_a_parent_does_not_take_in_time_is_counted(self, pipe):
        fd, queue = pipe
        assembler = logs._Assembler()
        sent = 0
        while not queue.lost:
            queue.put_nowait({"msg": f"{sent:100000}", "name": "n", "process_index": 3})
            sent += 1
        queue.put_nowait({"msg": "also lost", "name": "n"})
        assert queue.lost == 2
        assert len(self.feed(assembler, fd)) == sent - 1
        queue.put_nowait({"msg": "again", "name": "n", "process_index": 3})
        note, again = self.feed(assembler, fd)
        assert "2 log records were lost" in note.getMessage()
        assert note.process_index == 3
        assert again.msg == "again"
        assert queue.lost == 0

    def test_a_parent_that_is_gone_is_no_error(self):
        r, w = os.pipe()
        queue = logs.RecordPipe(w)
        os.close(r)
        queue.put_nowait({"msg": "m"})
        os.close(w)

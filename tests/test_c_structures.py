"""The pure-C structures: their C unit tests, and the heap against heapq."""

import ctypes
import heapq
import itertools
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

HERE = pathlib.Path(__file__).parent
CORE = HERE.parent / "src" / "_aiotools"
COMPILER = shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]

pytestmark = [
    pytest.mark.skipif(not CORE.is_dir(), reason="the C sources are not beside the tests"),
    pytest.mark.skipif(not COMPILER or sys.platform == "win32", reason="there is no C compiler of the Unix kind"),
]

FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{CORE}"]


def build(target, sources, *flags):
    subprocess.run(
        [*COMPILER, *FLAGS, *flags, *map(str, sources), "-o", str(target), "-lm"],
        check=True,
        timeout=50,
    )
    return target


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """The flags for ASan and UBSan, where the compiler has the libraries for them."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    folder = tmp_path_factory.mktemp("probe")
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    made = subprocess.run([*COMPILER, *flags, str(probe), "-o", str(folder / "probe")], capture_output=True)
    if made.returncode == 0:
        made = subprocess.run([str(folder / "probe")], capture_output=True)
    return flags if made.returncode == 0 else []


@pytest.mark.parametrize("structure", ["chunks", "heap", "link", "ptrmap", "ring"])
def test_the_c_unit_tests_pass(structure, sanitizers, tmp_path):
    sources = [HERE / "c" / f"test_{structure}.c"]
    if (CORE / f"{structure}.c").exists():
        sources.append(CORE / f"{structure}.c")
    program = build(tmp_path / structure, sources, "-O1", "-g", "-UNDEBUG", "-DAIOT_DEBUG", *sanitizers)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "checks passed" in done.stdout


class Node(ctypes.Structure):
    _fields_ = (("when", ctypes.c_double), ("order", ctypes.c_uint64), ("place", ctypes.c_size_t))


# What is static inline in heap.h, made callable, and a heap whose size ctypes need not know.
FACE = """
#include "heap.h"
#include <stdlib.h>
aiot_heap *face_new(void) { aiot_heap *h = malloc(sizeof *h); if (h) aiot_heap_init(h, realloc, free); return h; }
void face_free(aiot_heap *h) { aiot_heap_fini(h); free(h); }
void face_node_init(aiot_heap_node *n) { aiot_heap_node_init(n); }
int face_has(const aiot_heap_node *n) { return aiot_heap_has(n); }
aiot_heap_node *face_first(const aiot_heap *h) { return aiot_heap_first(h); }
size_t face_len(const aiot_heap *h) { return aiot_heap_len(h); }
aiot_heap_node *face_at(const aiot_heap *h, size_t i) { return aiot_heap_at(h, i); }
"""


@pytest.fixture(scope="module")
def heap_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heap")
    (folder / "face.c").write_text(FACE)
    target = build(
        folder / "heap.so", [folder / "face.c", CORE / "heap.c"], "-O1", "-UNDEBUG", "-DAIOT_DEBUG", "-fPIC", "-shared"
    )
    library = ctypes.CDLL(str(target))
    node, heap = ctypes.POINTER(Node), ctypes.c_void_p
    for name, result, *arguments in [
        ("face_new", heap),
        ("face_free", None, heap),
        ("face_node_init", None, node),
        ("face_has", ctypes.c_int, node),
        ("face_first", ctypes.c_void_p, heap),
        ("face_len", ctypes.c_size_t, heap),
        ("face_at", ctypes.c_void_p, heap, ctypes.c_size_t),
        ("aiot_heap_push", ctypes.c_int, heap, node, ctypes.c_double),
        ("aiot_heap_move", None, heap, node, ctypes.c_double),
        ("aiot_heap_remove", None, heap, node),
        ("aiot_heap_check", ctypes.c_int, heap),
    ]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def test_the_heap_does_what_heapq_does(heap_library):
    library = heap_library
    # Few values, so that ties are common.
    times = st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0, 1e9, float("inf"), float("-inf")]) | st.floats(allow_nan=False)

    class HeapAgainstHeapq(RuleBasedStateMachine):
        """The model is a heapq of (when, order of setting, number) with lazy deletion."""

        def __init__(self):
            super().__init__()
            self.heap = library.face_new()
            self.nodes = {}
            self.model = []
            self.current = {}
            self.orders = itertools.count()

        def teardown(self):
            library.face_free(self.heap)
            assert not any(library.face_has(node) for node in self.nodes.values())

        def set_in_model(self, number, when):
            entry = (when, next(self.orders), number)
            self.current[number] = entry
            heapq.heappush(self.model, entry)

        def first_of_model(self):
            while self.model and self.current.get(self.model[0][2]) != self.model[0]:
                heapq.heappop(self.model)
            return self.model[0][2] if self.model else None

        def first(self):
            address = library.face_first(self.heap)
            return next((n for n, node in self.nodes.items() if ctypes.addressof(node) == address), None)

        @rule(when=times)
        def push(self, when):
            node = Node()
            library.face_node_init(node)
            assert not library.face_has(node)
            number = len(self.nodes)
            self.nodes[number] = node
            assert library.aiot_heap_push(self.heap, node, when) == 0
            assert library.face_has(node)
            self.set_in_model(number, when)

        @rule(whens=st.lists(times, min_size=20, max_size=40))
        def push_many(self, whens):
            for when in whens:
                self.push(when)

        @precondition(lambda self: self.current)
        @rule(data=st.data(), when=times)
        def move(self, data, when):
            number = data.draw(st.sampled_from(sorted(self.current)))
            library.aiot_heap_move(self.heap, self.nodes[number], when)
            assert self.nodes[number].when == when
            self.set_in_model(number, when)

        @precondition(lambda self: self.current)
        @rule(data=st.data())
        def remove(self, data):
            number = data.draw(st.sampled_from(sorted(self.current)))
            library.aiot_heap_remove(self.heap, self.nodes[number])
            assert not library.face_has(self.nodes[number])
            del self.current[number]

        @rule(count=st.integers(1, 30))
        def pop(self, count):
            for _ in range(min(count, len(self.current))):
                number = self.first_of_model()
                assert self.first() == number
                library.aiot_heap_remove(self.heap, self.nodes[number])
                del self.current[number]

        @invariant()
        def same_first_and_length(self):
            assert self.first() == self.first_of_model()
            assert library.face_len(self.heap) == len(self.current)
            seen = {library.face_at(self.heap, i) for i in range(len(self.current))}
            assert seen == {ctypes.addressof(self.nodes[number]) for number in self.current}

        @invariant()
        def the_heap_is_sound(self):
            assert library.aiot_heap_check(self.heap) == 1

    run_state_machine_as_test(HeapAgainstHeapq, settings=settings(settings(), max_examples=60, stateful_step_count=40))

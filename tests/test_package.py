"""What the package shows: names, signatures, docstrings, stubs, version."""

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import pathlib
import pkgutil
import subprocess
import sys
import types
import typing

import pytest

import aiotools

PACKAGE = pathlib.Path(aiotools.__file__).parent
TREE = pathlib.Path(__file__).parent.parent

# The names that programs written for aiotools 2.2 import from the root, by the module that they come from.
CONTRACT = {
    "cancel": "cancel_and_wait",
    "compat": "all_tasks get_running_loop current_task set_task_name",
    "context": "resetting AsyncContextManager async_ctx_manager actxmgr aclosing closing_async AsyncContextGroup"
    " actxgroup AsyncExitStack",
    "defer": "DeferFunc AsyncDeferrable AsyncDeferFunc adefer defer",
    "fork": "AbstractChildProcess PosixChildProcess PidfdChildProcess afork",
    "func": "apartial lru_cache",
    "iter": "aiter",
    "server": "main main_context server_context start_server process_index AsyncServerContextManager"
    " ServerMainContextManager InterruptedBySignal",
    "supervisor": "Supervisor",
    "taskcontext": "ErrorArg ErrorCallback TaskContext",
    "taskgroup": "MultiError TaskGroup TaskGroupError current_taskgroup PersistentTaskGroup current_ptaskgroup",
    "taskscope": "TaskScope ShieldScope move_on_after",
    "timeouts": "Timeout timeout timeout_at",
    "timer": "TimerDelayPolicy VirtualClock create_timer",
    "types": "AsyncClosable AwaitableLike CoroutineLike",
    "utils": "as_completed_safe gather_safe race",
}
PRESENT = [name for name in CONTRACT if importlib.util.find_spec(f"aiotools.{name}") is not None]


def names_of_module(module):
    """Those names of the contract that the module has; all of them in a release."""
    found = importlib.import_module(f"aiotools.{module}")
    names = CONTRACT[module].split()
    return [name for name in names if hasattr(found, name)] if "dev" in aiotools.__version__ else names


EXPECTED = {"__version__"} | {name for module in PRESENT for name in names_of_module(module)}


def public_modules():
    yield aiotools
    # What lies deeper is internal, except what the contract names.
    for info in [
        *pkgutil.iter_modules(aiotools.__path__, "aiotools."),
        *pkgutil.iter_modules([str(PACKAGE / "taskgroup")], "aiotools.taskgroup."),
    ]:
        if not info.name.rpartition(".")[2].startswith("_"):
            yield importlib.import_module(info.name)


def core():
    return importlib.import_module("aiotools._aiotools")


class TestNames:
    def test_the_root_has_the_names_of_the_contract(self):
        missing = EXPECTED - set(aiotools.__all__)
        assert not missing, f"missing from aiotools.__all__: {sorted(missing)}"

    def test_what_the_root_has_beyond_the_contract_is_documented(self):
        """An addition is named as ``name`` in the documentation or the README."""
        additions = set(aiotools.__all__) - EXPECTED
        if not additions:
            return
        texts = [*TREE.glob("docs/**/*.rst"), *TREE.glob("README.rst")]
        text = "\n".join(path.read_text(encoding="utf-8") for path in texts)
        undocumented = {name for name in additions if f"``{name}" not in text and f":: {name}" not in text}
        assert not undocumented, f"in aiotools.__all__, not in the contract, not documented: {sorted(undocumented)}"

    @pytest.mark.parametrize("module", list(public_modules()), ids=lambda module: module.__name__)
    def test_all_lists_names_that_exist_each_once(self, module):
        names = list(getattr(module, "__all__", ()))
        assert len(names) == len(set(names))
        assert [name for name in names if not hasattr(module, name)] == []

    def test_a_release_has_all_modules_of_the_contract(self):
        if "dev" not in aiotools.__version__:
            assert set(CONTRACT) == set(PRESENT)

    @pytest.mark.parametrize("module", PRESENT)
    def test_a_module_of_the_contract_says_what_is_public(self, module):
        assert set(names_of_module(module)) <= set(importlib.import_module(f"aiotools.{module}").__all__)

    @pytest.mark.parametrize("module", PRESENT)
    def test_a_name_of_a_module_and_of_the_root_is_one_object(self, module):
        found = importlib.import_module(f"aiotools.{module}")
        different = [name for name in names_of_module(module) if getattr(found, name) is not getattr(aiotools, name)]
        assert not different

    def test_star_import_gives_exactly_all(self):
        namespace = {}
        exec("from aiotools import *", namespace)
        assert set(namespace) - {"__builtins__"} == set(aiotools.__all__)


class TestVersion:
    def test_it_is_that_of_the_installed_distribution(self):
        assert type(aiotools.__version__) is str
        assert aiotools.__version__ == importlib.metadata.version("aiotools")

    def test_the_distribution_needs_nothing_at_run_time(self):
        requires = importlib.metadata.requires("aiotools") or []
        assert [line for line in requires if "extra ==" not in line] == []

    def test_the_distribution_says_its_licence_and_its_python(self):
        metadata = importlib.metadata.metadata("aiotools")
        assert metadata["License-Expression"] == "MIT"
        assert metadata["Requires-Python"] == ">=3.11"
        assert metadata["Description-Content-Type"] == "text/x-rst"
        assert "Idiomatic helpers" in metadata.get_payload() + (metadata["Description"] or "")

    def test_the_package_is_marked_as_typed(self):
        assert (PACKAGE / "py.typed").exists()


class TestImport:
    def run(self, code, *options):
        return subprocess.run(
            [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=60, cwd=TREE / "tests"
        )

    def test_it_prints_nothing_and_warns_of_nothing(self):
        done = self.run("import aiotools", "-W", "error", "-X", "dev")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_it_starts_no_thread_and_no_loop(self):
        done = self.run(
            "import threading, asyncio, aiotools\n"
            "assert threading.active_count() == 1\n"
            "from asyncio import events\n"
            "assert events._get_running_loop() is None\n"
        )
        assert done.returncode == 0, done.stderr

    def test_without_the_core_it_is_a_loud_import_error(self):
        if importlib.util.find_spec("aiotools.timeouts") is None:
            pytest.skip("nothing in the package uses the core yet")
        done = self.run("import sys; sys.modules['aiotools._aiotools'] = None; import aiotools")
        assert done.returncode != 0
        assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr

    def test_the_core_is_a_compiled_module_without_exported_symbols(self):
        path = pathlib.Path(core().__file__)
        assert path.suffix in (".so", ".pyd")
        if sys.platform != "linux":
            return
        done = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True)
        if done.returncode == 0 and "__asan" not in done.stdout and "__ubsan" not in done.stdout:
            symbols = {line.split()[-1] for line in done.stdout.splitlines()}
            tools = ("_init", "_fini", "__odr_asan", "__gcov", "mangle_path")
            symbols = {name for name in symbols if not name.startswith(tools)}
            assert symbols == {"PyInit__aiotools"}


# --- docstrings and signatures -------------------------------------------------------------------------------------


def public_objects():
    """(dotted name, object) of all public classes and functions that are ours, and of their public members."""
    seen = set()
    for module in [*public_modules(), *([core()] if importlib.util.find_spec("aiotools._aiotools") else [])]:
        # Without __all__ a module of the package is internal; the core has no __all__ and is public by its names.
        names = getattr(module, "__all__", ())
        if module.__name__ == "aiotools._aiotools":
            names = [name for name in vars(module) if not name.startswith("_")]
        for name in names:
            value = getattr(module, name)
            if not (inspect.isclass(value) or callable(value)) or isinstance(value, types.ModuleType):
                continue
            owner = getattr(value, "__module__", None) or ""
            if not owner.startswith("aiotools") or id(value) in seen:
                continue
            seen.add(id(value))
            yield f"{module.__name__}.{name}", value


def public_members(cls):
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        if (
            inspect.isroutine(value)
            or isinstance(value, (property, staticmethod, classmethod))
            or inspect.isdatadescriptor(value)
        ):
            yield name, value


def is_alias(value):
    """A name for a typing construct, or an enumeration's member, has no documentation of its own."""
    if typing.is_typeddict(value):
        return True
    return not inspect.isclass(value) and not inspect.isroutine(value) and not inspect.isfunction(value)


OBJECTS = dict(public_objects())


@pytest.mark.parametrize("name", list(OBJECTS))
def test_every_public_name_has_a_docstring(name):
    value = OBJECTS[name]
    if is_alias(value):
        return
    assert inspect.getdoc(value), name
    if inspect.isclass(value):
        assert value.__doc__, f"{name} inherits its docstring"
        bare = [member for member, got in public_members(value) if not inspect.getdoc(getattr(value, member, got))]
        assert not bare, f"{name}: without a docstring: {bare}"


@pytest.mark.parametrize("name", list(OBJECTS))
def test_every_public_callable_has_a_signature(name):
    value = OBJECTS[name]
    if is_alias(value):
        return
    # An exception that takes what BaseException takes has no signature on some versions.
    plain = inspect.isclass(value) and issubclass(value, BaseException) and value.__init__ is BaseException.__init__
    if not (plain or (inspect.isclass(value) and value.__init__ is Exception.__init__)):
        inspect.signature(value)
    if inspect.isclass(value):
        for member, got in public_members(value):
            if inspect.isroutine(got) or isinstance(got, (staticmethod, classmethod)):
                inspect.signature(getattr(value, member))


# --- the stub against the core -------------------------------------------------------------------------------------


def stub_tree():
    path = PACKAGE / "_aiotools.pyi"
    return ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module(body=[], type_ignores=[])


def live(body):
    """The statements that hold on this interpreter: sys.version_info and sys.platform conditions are decided."""
    for node in body:
        if isinstance(node, ast.If):
            holds = eval(compile(ast.Expression(node.test), "<stub>", "eval"), {"sys": sys, "TYPE_CHECKING": True})
            yield from live(node.body if holds else node.orelse)
        else:
            yield node


def is_overload(node):
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def is_property(node):
    return any(ast.unparse(decorator).endswith(("property", ".setter")) for decorator in node.decorator_list)


def stub_parameters(node, bound):
    """[(name, kind, default source or None)] as the stub says; without self or cls if bound."""
    arguments = node.args
    P = inspect.Parameter
    found = []
    positional = [(a, P.POSITIONAL_ONLY) for a in arguments.posonlyargs] + [
        (a, P.POSITIONAL_OR_KEYWORD) for a in arguments.args
    ]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for (argument, kind), default in zip(positional, defaults, strict=True):
        # The older way to say positional-only in a stub.
        if argument.arg.startswith("__") and not argument.arg.endswith("__"):
            kind = P.POSITIONAL_ONLY
        found.append((argument.arg, kind, default))
    if arguments.vararg:
        found.append((arguments.vararg.arg, P.VAR_POSITIONAL, None))
    found += [(a.arg, P.KEYWORD_ONLY, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        found.append((arguments.kwarg.arg, P.VAR_KEYWORD, None))
    return found[1:] if bound else found


def the(owner, name):
    assert hasattr(owner, name), f"{owner.__name__}.{name} is in the stub only"
    return getattr(owner, name)


def compare(what, node, bound, value):
    try:
        signature = inspect.signature(value)
    except ValueError as exc:
        raise AssertionError(f"{what}: {exc}") from None
    said = stub_parameters(node, bound)
    runtime = list(signature.parameters.values())
    P = inspect.Parameter

    def shape(name, kind):
        # The name of a positional-only parameter cannot be used.
        return ("", kind) if kind in (P.POSITIONAL_ONLY, P.VAR_POSITIONAL, P.VAR_KEYWORD) else (name, kind)

    assert [shape(n, k) for n, k, _ in said] == [shape(p.name, p.kind) for p in runtime], (
        f"{what}: the stub says ({ast.unparse(node.args)}), the module {signature}"
    )
    for (name, _, default), parameter in zip(said, runtime, strict=True):
        has = parameter.default is not P.empty
        assert (default is not None) == has, f"{what}: default of {name}"
        if default is None or (isinstance(default, ast.Constant) and default.value is ...):
            continue
        try:
            literal = ast.literal_eval(default)
        except ValueError:
            assert ast.unparse(default) in (repr(parameter.default), str(parameter.default)), (
                f"{what}: default of {name}"
            )
        else:
            assert literal == parameter.default and type(literal) is type(parameter.default), (
                f"{what}: default of {name}"
            )


def stub_problems(tree, module):
    """Yields (what, check): each check raises AssertionError if stub and module disagree there."""
    functions = {}
    classes = {}
    names = set()
    for node in live(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
            functions.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
            classes[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)

    def missing_in_stub():
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)
        }
        assert public <= names, f"not in the stub: {sorted(public - names)}"

    yield "names", missing_in_stub
    for name, nodes in functions.items():
        if not any(is_overload(node) for node in nodes):
            yield name, lambda name=name, nodes=nodes: compare(name, nodes[0], False, the(module, name))
    for name, node in classes.items():
        cls = getattr(module, name, None)
        if cls is None:
            # A protocol or alias that exists for type checkers only is private.
            yield name, lambda name=name: name.startswith("_") or the(module, name)
            continue
        yield from class_problems(name, node, cls)


def class_problems(name, node, cls):
    members = {}
    for item in live(node.body):
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
            members.setdefault(item.name, []).append(item)
        elif isinstance(item, ast.AnnAssign):
            members.setdefault(item.target.id, [])

    def members_in_stub():
        public = {member for member, _ in public_members(cls)}
        assert public <= set(members), f"{name}: not in the stub: {sorted(public - set(members))}"

    yield f"{name} members", members_in_stub
    for member, nodes in members.items():
        what = f"{name}.{member}"
        if not nodes or any(is_overload(item) for item in nodes) or any(is_property(item) for item in nodes):
            yield what, lambda member=member: the(cls, member)
        elif member in ("__init__", "__new__"):
            yield name, lambda item=nodes[0]: compare(name, item, True, cls)
        elif not member.startswith("__"):
            decorators = [ast.unparse(decorator) for decorator in nodes[0].decorator_list]
            if "staticmethod" in decorators:
                yield what, lambda member=member, item=nodes[0], what=what: compare(what, item, False, the(cls, member))
            elif "classmethod" in decorators:
                yield what, lambda member=member, item=nodes[0], what=what: compare(what, item, True, the(cls, member))
            else:
                # Unbound: the runtime signature shows self, as the stub does.
                yield what, lambda member=member, item=nodes[0], what=what: compare(what, item, False, the(cls, member))
        else:
            yield what, lambda member=member: the(cls, member)


def collect_stub_checks():
    if importlib.util.find_spec("aiotools._aiotools") is None:
        return []
    return [pytest.param(check, id=what) for what, check in stub_problems(stub_tree(), core())]


@pytest.mark.parametrize("check", collect_stub_checks())
def test_the_stub_says_what_the_core_has(check):
    check()


class TestTheComparison:
    """The comparison itself finds each way to disagree."""

    def problems(self, stub, **names):
        module = types.ModuleType("m")
        vars(module).update(names)
        found = []
        for _, check in stub_problems(ast.parse(stub), module):
            try:
                check()
            except (AssertionError, pytest.fail.Exception) as exc:
                found.append(str(exc))
        return found

    def test_agreement(self):
        class C:
            def __init__(self, a, /, *, b=None):
                pass

            def m(self, x=1):
                pass

        def f(a, /, b=2, *args, c, **more):
            pass

        stub = "def f(a, /, b: int = 2, *args: int, c, **more): ...\nclass C:\n"
        stub += "    def __init__(self, a, /, *, b=None) -> None: ...\n    def m(self, x: int = ...) -> None: ...\n"
        assert self.problems(stub, f=f, C=C) == []

    @pytest.mark.parametrize(
        "stub",
        [
            "",
            "def f(a, b=2): ...",
            "def f(a, /, c=2): ...",
            "def f(a, /, b=3): ...",
            "def f(a, /, b): ...",
            "def f(a, /, *, b=2): ...",
            "def f(a, /, b=2, *args): ...",
            "def f(a, /, b=2.0): ...",
            "def f(a, /, b=2): ...\ndef g(): ...\nclass D: ...",
        ],
    )
    def test_disagreement(self, stub):
        def f(a, /, b=2):
            pass

        names = {"f": f}
        if "def g" in stub:
            names["g"] = f
        assert self.problems(stub, **names)

    def test_a_method_that_the_stub_lacks(self):
        class C:
            def m(self):
                pass

        assert self.problems("class C:\n    pass\n", C=C)
        assert self.problems("class C:\n    def m(self): ...\n    def n(self): ...\n", C=C)

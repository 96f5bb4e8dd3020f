"""Build of the extension ``aiotools._aiotools``; all metadata is in pyproject.toml.

Options come from the environment; set to 1 (unset, empty or 0 is off):

AIOTOOLS_DEBUG     assertions and invariant checks after each change (AIOT_DEBUG), -O0 -g
AIOTOOLS_ASAN      AddressSanitizer and UndefinedBehaviorSanitizer (gcc, clang)
AIOTOOLS_TSAN      ThreadSanitizer (gcc, clang); not together with AIOTOOLS_ASAN
AIOTOOLS_COVERAGE  gcov counters, -O0 (gcc, clang)
AIOTOOLS_WERROR    all warnings that CI asks for, as errors

CC and CFLAGS work as everywhere. The objects of each interpreter and set of options have a folder of their
own under build/, so switching between them never links stale objects; only what changed is compiled.

    python setup.py build_ext --inplace        the quick way while developing
"""

import hashlib
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
CORE = Path("src", "_aiotools")
OPTIONS = ("DEBUG", "ASAN", "TSAN", "COVERAGE", "WERROR")

GNU_FLAGS = ["-std=c11", "-fvisibility=hidden"]
GNU_WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
MSVC_FLAGS = ["/std:c11", "/utf-8"]
MSVC_WARNINGS = ["/W3"]


def option(name: str) -> bool:
    value = os.environ.get(f"AIOTOOLS_{name}", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"AIOTOOLS_{name} must be 0 or 1, not {value!r}")
    return value == "1"


def flags(compiler_type: str) -> tuple[list[str], list[str]]:
    """The flags for compiling and for linking."""
    sanitize = option("ASAN") or option("TSAN")
    if compiler_type == "msvc":
        if sanitize or option("COVERAGE"):
            raise SystemExit("sanitizers and coverage need gcc or clang")
        compile_, link = [*MSVC_FLAGS, *MSVC_WARNINGS], []
        compile_ += ["/Od", "/Zi"] if option("DEBUG") else ["/O2"]
        if option("DEBUG"):
            link += ["/DEBUG"]
        if option("WERROR"):
            compile_ += ["/WX"]
        return compile_, link
    compile_, link = [*GNU_FLAGS, *GNU_WARNINGS], []
    if option("WERROR"):
        compile_ += ["-Werror"]
    if option("DEBUG") or option("COVERAGE"):
        compile_ += ["-O0", "-g"]
    elif sanitize:
        compile_ += ["-O1", "-g"]
    else:
        compile_ += ["-O3"]
    if option("ASAN") and option("TSAN"):
        raise SystemExit("AIOTOOLS_ASAN and AIOTOOLS_TSAN exclude each other")
    if option("ASAN"):
        both = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        compile_ += [*both, "-fno-omit-frame-pointer"]
        link += both
    if option("TSAN"):
        compile_ += ["-fsanitize=thread", "-fno-omit-frame-pointer"]
        link += ["-fsanitize=thread"]
    if option("COVERAGE"):
        compile_ += ["--coverage"]
        link += ["--coverage"]
    return compile_, link


def build_name() -> str:
    """Names the folder of objects: interpreter, options, and what else decides the code."""
    tag = sysconfig.get_config_var("SOABI") or sysconfig.get_config_var("EXT_SUFFIX") or "python"
    on = [name.lower() for name in OPTIONS if option(name)] or ["plain"]
    extra = "\0".join(os.environ.get(name, "") for name in ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS"))
    digest = hashlib.sha256(extra.encode()).hexdigest()[:8]
    # Two patch releases of one series share a SOABI; a virtual environment is not a different interpreter.
    digest += hashlib.sha256((sysconfig.get_path("include") or "").encode()).hexdigest()[:8]
    return "-".join([tag.strip(".").replace(os.sep, "_"), *on, digest])


class BuildCore(build_ext):
    """build_ext that keeps builds apart and compiles only what changed, on all processors."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.name = build_name()
        given = Path(self.build_temp).absolute()
        # pip gives a temporary folder of its own; beside it is no place for us.
        place = given.parent if given.is_relative_to(HERE.absolute()) else given
        self.build_temp = str(place / f"temp.{self.name}")
        # What was linked last into the place where Python will find it?
        if self.inplace:
            self.stamp = HERE / "build" / f"inplace.{sysconfig.get_config_var('SOABI')}"
        else:
            self.stamp = Path(self.build_temp) / f"linked.{hashlib.sha256(self.build_lib.encode()).hexdigest()[:8]}"
        if not self.stamp.exists() or self.stamp.read_text() != self.name:
            self.force_link = True
            self.force = True
        else:
            self.force_link = False

    def build_extensions(self) -> None:
        compile_, link = flags(self.compiler.compiler_type)
        for ext in self.extensions:
            ext.extra_compile_args += compile_
            ext.extra_link_args += link
            if option("DEBUG"):
                ext.undef_macros.append("NDEBUG")
                ext.define_macros.append(("AIOT_DEBUG", "1"))
        compile_all = self.compiler.compile
        self.compiler.force = False

        def compile_stale(sources, output_dir=None, depends=(), **options):
            newest = max(os.stat(path).st_mtime for path in [*depends, __file__])
            objects, stale = [], []
            for source in sources:
                [made] = self.compiler.object_filenames([source], output_dir=output_dir)
                objects.append(made)
                wanted = max(newest, os.stat(source).st_mtime)
                if not os.path.exists(made) or os.stat(made).st_mtime < wanted:
                    stale.append(source)
                    Path(made).parent.mkdir(parents=True, exist_ok=True)

            def compile_one(source):
                compile_all([source], output_dir=output_dir, **options)

            if self.compiler.compiler_type == "msvc":
                if stale:
                    compile_all(stale, output_dir=output_dir, **options)
            else:
                with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                    list(pool.map(compile_one, stale))
            return objects

        self.compiler.compile = compile_stale
        try:
            super().build_extensions()
        finally:
            del self.compiler.compile
        self.stamp.parent.mkdir(parents=True, exist_ok=True)
        self.stamp.write_text(self.name)


def paths(pattern: str) -> list[str]:
    # The standard wants relative paths with forward slashes here.
    return sorted(path.relative_to(HERE).as_posix() for path in (HERE / CORE).glob(pattern))


def long_description() -> str:
    parts = [HERE / "README.rst", HERE / "CHANGES.rst"]
    return "\n\n".join(path.read_text(encoding="utf-8").strip() for path in parts) + "\n"


setup(
    ext_modules=[
        Extension(
            "aiotools._aiotools",
            sources=paths("*.c"),
            depends=paths("*.h"),
            include_dirs=[CORE.as_posix()],
        )
    ],
    cmdclass={"build_ext": BuildCore},
    long_description=long_description(),
    long_description_content_type="text/x-rst",
)

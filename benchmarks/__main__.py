"""python -m benchmarks [--loops default,uvloop] [--rounds 30] [--rivals FOLDER] [case ...]

Rivals are looked for in a folder that pip makes, and otherwise in the environment:

    pip install --target .work/rivals aiotools==2.2.4 async-lru asyncstdlib typing_extensions
"""

import argparse
import importlib
import pathlib
import pkgutil
import platform
import sys

import benchmarks
from benchmarks import common


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", help="names of cases, or beginnings of them; all without")
    parser.add_argument("--loops", default=",".join(common.available_loop_kinds()))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rivals", type=pathlib.Path, default=common.TREE / ".work" / "rivals")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal that must be reached is missed")
    options = parser.parse_args()
    common.RIVALS = options.rivals
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name not in ("common", "__main__"):
            importlib.import_module(f"benchmarks.{module.name}")
    print(f"{platform.python_implementation()} {platform.python_version()}, best of {options.rounds} rounds, CPU time")
    fine = True
    for case in common.CASES:
        if options.cases and not any(case.name.startswith(name) for name in options.cases):
            continue
        for kind in options.loops.split(","):
            fine &= common.report(case, kind, common.measure(case, kind, options.rounds))
    return 0 if fine or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())

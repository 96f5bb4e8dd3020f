"""Prints the requirements of the named dependency groups of pyproject.toml, one a line.

pip can install groups itself from 25.1 on; the pip that comes with an older Python cannot.
"""

import pathlib
import sys
import tomllib

PYPROJECT = pathlib.Path(__file__).parent.parent / "pyproject.toml"


def expand(groups, name):
    for item in groups[name]:
        if isinstance(item, dict):
            yield from expand(groups, item["include-group"])
        else:
            yield item


def main():
    with PYPROJECT.open("rb") as file:
        data = tomllib.load(file)
    wanted = []
    for name in sys.argv[1:]:
        wanted += (
            data["build-system"]["requires"] if name == "build-system" else expand(data["dependency-groups"], name)
        )
    print("\n".join(dict.fromkeys(wanted)))


if __name__ == "__main__":
    main()

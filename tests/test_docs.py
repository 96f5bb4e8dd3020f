"""The documentation names all that is public, and what it shows exists."""

import ast
import importlib
import pathlib
import re
import textwrap

import pytest

import aiotools
import aiotools.server
import aiotools.server.control

DOCS = pathlib.Path(__file__).parent.parent / "docs"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="runs where the documentation is")


def pages():
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.rst"))}


def described():
    """Dotted names that a directive describes; several may share one, each on a line."""
    found = set()
    for text in pages().values():
        module = "aiotools"
        directive = re.compile(r"^(\s*)\.\. (currentmodule|auto\w+|data|function|class):: (.+)$")
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if not (match := directive.match(line)):
                continue
            indent, kind, name = match.groups()
            if kind == "currentmodule":
                module = name
                continue
            names = [name]
            for more in lines[number + 1 :]:
                if not re.match(rf"^{indent}\s{{4,}}[\w.]+(\(.*\))?$", more):
                    break
                names.append(more.strip())
            if kind == "automodule":
                [members] = re.findall(rf"^{re.escape(line)}\n\s+:members: (.+)$", text, re.M) or [""]
                names = [f"{name}.{member.strip()}" for member in members.split(",") if member]
            for one in names:
                one = one.partition("(")[0]
                found.add(one if one.startswith("aiotools.") else f"{module}.{one}")
    return found


@pytest.mark.parametrize("module", ["aiotools", "aiotools.server", "aiotools.server.control"])
def test_every_public_name_is_described(module):
    # ``main`` is decorator and context; plumbing of the control socket is for the server alone.
    hidden = {"aiotools.__version__", "aiotools.server.control.ControlSocket", "aiotools.server.control.PidFile"}
    public = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    if module == "aiotools.server":
        # What the root has is described there.
        public = {name for name in public if name.rpartition(".")[2] not in aiotools.__all__}
    assert public - hidden - described() == set()


def test_what_is_described_exists():
    missing = []
    for name in described():
        parts = name.split(".")
        for length in range(len(parts) - 1, 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:length]))
            except ImportError:
                continue
            for part in parts[length:]:
                found = getattr(found, part, None)
            break
        if found is None:
            missing.append(name)
    assert missing == []


def code_blocks():
    for page, text in pages().items():
        for number, block in enumerate(re.findall(r"\.\. code-block:: python\n\n((?:[ ]+.*\n|\n)+)", text)):
            yield pytest.param(textwrap.dedent(block), id=f"{page}-{number}")


@pytest.mark.parametrize("block", list(code_blocks()))
def test_code_in_the_documentation_compiles_and_uses_what_exists(block):
    tree = compile(block, "<docs>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aiotools"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), alias.name
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "aiotools":
            assert hasattr(aiotools, node.attr), node.attr


def test_the_signals_and_verbs_of_the_documentation_are_those_of_the_command():
    text = pages()["server-operation"]
    for verb in aiotools.server.control.VERBS:
        assert f"``{verb}``" in text, verb


def test_every_page_is_in_the_table_of_contents():
    index = pages()["index"]
    listed = set(re.findall(r"^   ([\w-]+)$", index, re.M))
    assert listed == set(pages()) - {"index"}


def test_every_example_is_named():
    text = pages()["first-steps"]
    for path in (DOCS.parent / "examples").glob("*.py"):
        assert f"``{path.name}``" in text, path.name

"""Sphinx: `make docs` writes docs/_build/html, with warnings as errors."""

import aiotools

project = "aiotools"

copyright = "the aiotools authors"
version = release = aiotools.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "py:obj"
# Names of ours need no prefix.
rst_prolog = ".. py:currentmodule:: aiotools\n"
html_theme = "alabaster"
html_theme_options = {"description": "Idiomatic helpers for asyncio", "fixed_sidebar": True, "page_width": "1100px"}
html_copy_source = False

autodoc_member_order = "bysource"
# The stubs have the types; here they would bury the signatures.
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
toc_object_entries = False
python_maximum_signature_line_length = 100

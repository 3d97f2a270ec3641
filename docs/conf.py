"""Sphinx settings of the documentation's site. `make docs` builds it, with every warning as an error.

The source folder is the repository's root, so that a link between two Markdown files is the same on the site, in an
editor and on a code host. The pages are plain Markdown; site_pages.py adds what a site needs besides.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "src")]

import semisparse  # noqa: E402

project = "semisparse"
author = "The semisparse developers"
copyright = "2026, the semisparse developers"
version = release = semisparse.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_pages"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "lab/README.md", "benchmarks/cards/*.md"]
exclude_patterns = [".*", "site", "src", "tests", "csrc", "dist"]

myst_heading_anchors = 4  # the anchors that code hosts make

# What the integrations are for, and what a machine without a GPU may lack: imported as empty stand-ins.
autodoc_mock_imports = ["accelerate", "lightning", "torchtitan", "transformers", "triton", "nvmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
default_role = "literal"  # docstrings are plain text with an occasional `name`
smartquotes_action = "D"  # dashes; quotes in docstrings are Python's
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"semisparse {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

"""The site: Sphinx with furo, built strictly by scripts/docs. CONTRIBUTING.md says why these."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from crossdock.version import __version__  # noqa: E402 - from this tree

project, copyright, author = "Crossdock", "Crossdock's authors, Apache-2.0", "Crossdock's authors"  # noqa: A001
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "index"
nitpicky = True
default_role = "any"
html_theme = "furo"
html_title = f"Crossdock {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False

myst_heading_anchors = 4
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

OTHERS = ("torch", "numpy", "np.", "collections", "jaxtyping", "pathlib", "os.", "typing", "Triton", "importlib")
"""Names of other packages, whose documents are not here to be linked to."""
MADE_BY_THE_LIBRARY = {
    f"crossdock.{name}" for name in ("Received", "Pending", "Stats", "ThreadGroup", "Plan", "Hop", "PlanTensors")
}


def leave_plain(_app: Sphinx, _env: BuildEnvironment, node: pending_xref, inner: nodes.Node) -> nodes.Node | None:
    """Shows as text what leads outside, and types of signatures that have no page. Any other name is an error."""
    of_signature = node.get("refdomain") == "py" and node.get("reftype") in ("class", "obj", "data", "exc")
    return inner if of_signature or node.get("reftarget", "").startswith(OTHERS) else None


def made_by_the_library(_app: Sphinx, _what: str, name: str, *_: object) -> tuple[str, str] | None:
    """Leaves out the constructors of what verbs give."""
    return ("", "") if name in MADE_BY_THE_LIBRARY else None


def setup(app: Sphinx) -> None:
    """What extensions do not have: plain drawings, names that lead outside, constructors that nobody calls."""
    app.add_lexer("diagram", TextLexer)
    app.connect("missing-reference", leave_plain)
    app.connect("autodoc-process-signature", made_by_the_library)

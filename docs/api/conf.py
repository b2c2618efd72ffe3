"""Sphinx settings of the API reference; docs/api.md says how to build it.

Formulas become MathML: every current browser shows it, and no page fetches anything.
"""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import als_ext

project = "als_ext"
release = version = als_ext.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"
html_theme = "basic"
html_static_path = ["api.css"]
html_css_files = ["api.css"]
autodoc_mock_imports = ["cleanlab", "datasets", "lightning", "skorch", "transformers"]  # optional
html_show_copyright = html_show_sphinx = html_copy_source = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
nitpicky = True  # warns of references that lead nowhere
# Other people's: their pages are elsewhere, and nothing is fetched to find them.
_OTHERS = "torch|numpy|pandas|sklearn|collections|os|pathlib|pd|rich|Tensor|ProcessGroup"
# Types of ours that only signatures name.
_TYPES = r"Array|ArrayT|PiRule|PiState|Graph|JointBatch|Amp|Mentor|True|False|\w+Settings"
nitpick_ignore_regex = [
    ("py:.*", rf"({_OTHERS})(\..*)?"),
    ("py:class", rf"(als_ext\.([\w.]+\.)?)?({_TYPES})"),
    # scikit-learn's words in docstrings that AlsClassifier gets from it
    ("std:(ref|term)", "metadata_routing|meta-estimator"),
    ("py:class", r"default=sklearn\..*"),
]


def inline_math(writer, node):
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(writer, node):
    writer.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))

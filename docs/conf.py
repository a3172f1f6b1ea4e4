"""The documentation site: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

import jupyter_gpupool

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))

project = "jupyter_gpupool"
author = "jupyter_gpupool contributors"
project_copyright = author
version = release = jupyter_gpupool.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "generated",
    "source_pages",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

# The public interface is documented by name; what the standard library and PyTorch define is not linked,
# because the build works without a network.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["torch"]
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!jupyter_gpupool\.(attach|Lease|Picker|Monitor)$).*")]

copybutton_prompt_text = r"^\$ |>>> "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = "jupyter_gpupool"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "jupyter_gpupool"},
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
}

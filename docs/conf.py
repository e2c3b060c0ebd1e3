"""Sphinx's settings. The sources are not here: docs/website.py makes them from the notebooks, into _proc/."""
from nbdev.config import get_config

cfg = get_config()
project, author, release = cfg.title, cfg.author, cfg.version
copyright = cfg.copyright

extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # `show_doc`'s headings are level 3, wherever they stand

nb_execution_mode = "off"  # what a notebook shows is what it printed when its author ran it
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # they would come from another host
nb_code_prompt_show = nb_code_prompt_hide = "Source"

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_js_files = [("diagrams.js", {"defer": "defer"})]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's machine is; the theme complains where it is not told
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = {
    "logo": {"text": project},
    "icon_links": [{"name": "Source", "url": cfg.git_url, "icon": "fa-brands fa-git-alt"}],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_toc_level": 2,
    "navigation_with_keys": False,
}
copybutton_exclude = ".linenos, .gp, .go"

"""Sphinx's settings. The sources are not here: docs/website.py makes them from the notebooks, into _proc/."""
from nbdev.config import get_config

cfg = get_config()
project, author, version, release = cfg.title, cfg.author, cfg.version, cfg.version
copyright = cfg.copyright

extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design", "reference", "search", "visitors"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # `show_doc`'s headings are level 3, wherever they stand

nb_execution_mode = "off"  # what a notebook shows is what it printed when its author ran it
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # they would come from another host
nb_code_prompt_show = nb_code_prompt_hide = "Source"

# The reference, which docs/reference.py writes
add_module_names = False
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_js_files = [("diagrams.js", {"defer": "defer"})]
html_show_search_summary = False  # it would fetch each page that was found, with the code that the search leaves out
html_context = {"default_mode": "auto"}  # light or dark, as the reader's machine is; the theme complains where it is not told
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = {
    "logo": {"text": project},
    "icon_links": [{"name": "Source", "url": cfg.git_url, "icon": "fa-brands fa-git-alt"}],
    "header_links_before_dropdown": 6,
    "navbar_start": ["navbar-logo", "version"],
    "article_header_end": ["page-links"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["project-links"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
}
copybutton_exclude = ".linenos, .gp, .go"

# What visitors expect besides pages
html_baseurl = f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/") + "/"
html_favicon = "_static/favicon.svg"
templates_path = ["_templates"]

"""What visitors of a site expect besides its pages: the changelog and the license, a page's source, a notebook to download, a twin in
Markdown, llms.txt, sitemap.xml, a page for wrong addresses, and what a chat shows of a link.

`website.py` calls `project_pages`, `tell`, `lay_out` and `publish`; to Sphinx it is an extension, which `conf.py` names.
"""
from __future__ import annotations

import posixpath
import re
import shutil
from html import escape, unescape
from pathlib import Path
from urllib.parse import urljoin

from bridge import CALLOUT, Page, markdown_cell, read_callout
from docutils import nodes
from nbdev.config import get_config
from sphinx.builders.text import TextBuilder
from sphinx.writers.text import TextTranslator

ROOT = Path(__file__).resolve().parents[1]
PROJECT = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md", "license": "LICENSE"}
MADE = {"reference/index"}  # sections with more on their page than what is below them
NO_PAGES = {"404", "search", "genindex", "py-modindex"}  # they are for nobody to find or to read elsewhere
NOT_FOUND = """---
orphan: true
---
# Not found

> There is no page at this address. It may have moved.

Search for what it was about, in the field above or with Ctrl K, or begin on [the first page](/index.ipynb).
"""


def base() -> str:
    "The address of the site, with a slash at its end"
    return f"{get_config().doc_host}{get_config().doc_baseurl}".rstrip("/") + "/"


# --- pages that are no notebooks ---

def project_pages(root: Path = ROOT) -> dict[str, Page]:
    "The changelog, how to contribute, and the license, as pages"
    changes, work, terms = ((root / file).read_text(encoding="utf-8") for file in PROJECT.values())
    about = {"changelog": ("Changelog", "What changed for users, by version, newest first", changes),
             "contributing": ("Contributing", "How the project is worked on: set up, change, check, commit", work),
             "license": ("License", "Apache 2.0: use it, change it, pass it on, and keep the notice", f"# \n\n```text\n{terms.strip(chr(10))}\n```\n")}
    pages = {}
    for name, (title, description, text) in about.items():
        text = re.sub(r"\]\(nbs/", "](/", re.sub(r"\A# .*\n", f"# {title}\n\n> {description}\n", text))
        pages[name] = Page(name, title, description, [markdown_cell(text)], set())
    return pages


def source(name: str) -> str | None:
    "The file of the repository that a page is written in; none for pages that are made"
    if name in PROJECT: return PROJECT[name]
    return f"nbs/{name}.ipynb" if (ROOT / "nbs" / f"{name}.ipynb").exists() else None


# --- fences that a git host and JupyterLab show as what is in them ---

CARDS = re.compile(r"^::: *\{\.cards\} *\n(.*?)^::: *$", re.M | re.S)
TABS = re.compile(r"^::: *\{\.panel-tabset\} *\n(.*?)^::: *$", re.M | re.S)


def panels(text: str) -> str:
    "A list between `::: {.cards}` and `:::` as cards; what is between `::: {.panel-tabset}` and `:::` as tabs, each begun by its title in bold"
    def cards(m):
        made = []
        for item in re.split(r"^- ", m[1], flags=re.M)[1:]:
            head = re.match(r"\[\*\*(.+?)\*\*\]\(([^)\s]+)\):?\s*|\*\*(.+?)\*\*:?\s*", item)
            link = [f":link: {posixpath.splitext(head[2])[0]}", ":link-type: doc"] if head[2] else []
            made += [f":::{{grid-item-card}} {head[1] or head[3]}", *link, "", re.sub(r"\n +", "\n", item[head.end():]).strip(), ":::"]
        return "\n".join([f"::::{{grid}} 1 2 {3 if made.count(':::') == 3 else 2} {min(4, made.count(':::'))}", ":gutter: 3", "", *made, "::::"])

    def tabs(m):
        parts = re.split(r"^\*\*(.+)\*\* *\n", m[1], flags=re.M)[1:]
        made = [line for title, body in zip(parts[::2], parts[1::2]) for line in (f":::{{tab-item}} {title}", "", body.strip("\n"), "", ":::")]
        return "\n".join(["::::{tab-set}", "", *made, "::::"])
    return TABS.sub(tabs, CARDS.sub(cards, text))


def lay_out(pages: dict[str, Page]) -> None:
    "Cards and tabs in every Markdown cell"
    for cell in (cell for page in pages.values() for cell in page.cells if cell["cell_type"] == "markdown"):
        cell["source"] = panels("".join(cell["source"]))


def unfenced(text: str) -> str: return TABS.sub(r"\1", CARDS.sub(r"\1", text))


# --- twins in Markdown ---

def output_text(output: dict) -> str:
    "What an output says in plain text; nothing for a picture"
    data = output.get("data", {})
    if any(kind.startswith("image/") for kind in data): return ""
    return "".join(output.get("text") or data.get("text/plain") or output.get("traceback") or "").rstrip("\n")


def prose(text: str) -> str:
    "A Markdown cell for reading as text: boxes as quotes, pictures as what they show, links to twins"
    def quote(m):
        kind, title, body, _ = read_callout(m)
        return "\n".join(f"> {line}".rstrip() for line in [f"**{title or kind.capitalize()}**", "", *body.splitlines()])
    text = re.sub(r'<a id="[^"]*"></a>\n*', "", CALLOUT.sub(quote, unfenced(text)))
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"(Picture: \1)", text)
    return re.sub(r"(\]\((?![a-z]+:)[^)\s#]+)\.ipynb\b", r"\1.md", text).strip()


def twin(page: Page) -> str:
    "A page in Markdown: its prose, its code, and what its cells print"
    parts = []
    for cell in page.cells:
        text, tags = "".join(cell["source"]), cell["metadata"].get("tags", ())
        if cell["cell_type"] == "markdown": parts.append(prose(text))
        else:
            if "remove-input" not in tags: parts.append(f"```python\n{text}\n```")
            said = "\n".join(filter(None, map(output_text, cell["outputs"] if "remove-output" not in tags else ())))
            if said: parts.append(f"```text\n{said}\n```")
    return "\n\n".join(filter(None, parts)) + "\n"


class Said(TextTranslator):
    "A page as Sphinx's text, with nothing for what has no text"
    def unknown_visit(self, node): pass
    def unknown_departure(self, node): pass


def twin_of(doctree: nodes.document, app) -> str:
    "The same for a page that is made without a notebook"
    builder = TextBuilder(app, app.env)
    builder.init()
    doctree.walkabout(said := Said(doctree, builder))
    return re.sub(r"\A(.*)\n\*+\n", r"# \1\n", said.body.strip()) + "\n"


def tell(pages: dict[str, Page]) -> dict[str, tuple[str, str, str]]:
    "Each page's title, description and twin; to be asked before its names become Sphinx's links"
    return {name: (page.title, page.description, twin(page)) for name, page in pages.items()}


def of_sections(sections: list, told: dict[str, tuple[str, str, str]]) -> dict[str, tuple[str, str, str]]:
    "The same for the index pages of sections"
    made = {}
    for section in (s for s in sections if not isinstance(s, str)):
        made |= (below := of_sections(section.items, told))
        known = told | below
        items = {name: known[name] for item in section.items if (name := item if isinstance(item, str) else item.name) in known}
        lines = [f"- [{title}]({posixpath.relpath(name, posixpath.dirname(section.name))}.md): {about}" for name, (title, about, _) in items.items()]
        if not lines or section.name in MADE: continue
        made[section.name] = section.title, ", ".join(title for title, *_ in items.values()), "\n".join([f"# {section.title}", "", *lines, ""])
    return made


def llms(sections: list, told: dict[str, tuple[str, str, str]], start: str) -> str:
    "llms.txt: what there is, and where in Markdown; `start` is the title and line of the project"
    groups = [("Start", [s for s in sections if isinstance(s, str)]), *((s.title, s.pages()) for s in sections if not isinstance(s, str))]
    groups.append(("More", sorted(told.keys() - {name for _, names in groups for name in names})))
    lines = [start]
    for title, names in groups:
        if names := [name for name in names if name in told]:
            lines += ["", f"## {title}", "", *(f"- [{told[n][0]}]({base()}{n}.md): {told[n][1]}" for n in names)]
    return "\n".join([*lines, ""])


# --- the finished site ---

def found(site: Path) -> list[str]:
    "The names of the pages that people may look for"
    names = (path.relative_to(site).with_suffix("").as_posix() for path in sorted(site.rglob("*.html")))
    return [name for name in names if not name.startswith("_") and name not in NO_PAGES]


def read_head(path: Path) -> tuple[str, str]:
    "The title and the description of a finished page; nothing for what it lacks"
    html, site_title = path.read_text(encoding="utf-8"), re.escape(get_config().title)
    title, about = re.search(r"<title>(.*?)</title>", html, re.S), re.search(r'<meta name="description" content="([^"]*)"', html)
    return re.sub(rf"\s+[—-]\s+{site_title}.*", "", unescape(title[1] if title else ""), flags=re.S).strip(), unescape(about[1] if about else "")


def sitemap(site: Path) -> str:
    urls = (f"  <url><loc>{escape(f'{base()}{name}.html')}</loc></url>" for name in found(site))
    return "\n".join(['<?xml version="1.0" encoding="utf-8"?>', '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">', *urls, "</urlset>", ""])


def at_any_depth(html: str, root: str) -> str:
    "A page whose links start from the `root` of the site, because it is shown in place of pages in any folder"
    link = re.compile(r'(\s(?:href|src|action|data-content_root)=)"(?![a-z]+:|[#/])([^"]*)"')
    return link.sub(lambda m: f'{m[1]}"{urljoin(root, m[2]) if m[2] != "#" else m[2]}"', html)


def publish(site: Path, sections: list, told: dict[str, tuple[str, str, str]], nbs: Path = ROOT / "nbs") -> list[str]:
    "Put all of it beside the pages that Sphinx has written; returns what is wrong"
    cfg, indexes, pages = get_config(), of_sections(sections, told), {}
    told = told | indexes
    for name in found(site):
        pages[name] = told.get(name) or (*read_head(site / f"{name}.html"), "")
        if name in told: (site / f"{name}.md").write_text(told[name][2], encoding="utf-8")  # else Sphinx has
        if (nbs / f"{name}.ipynb").exists(): shutil.copy(nbs / f"{name}.ipynb", site / f"{name}.ipynb")
    to_read = {name: about for name, about in pages.items() if name not in indexes}
    (site / "llms.txt").write_text(llms(sections, to_read, f"# {cfg.title}\n\n> {cfg.description}"), encoding="utf-8")
    (site / "sitemap.xml").write_text(sitemap(site), encoding="utf-8")
    (site / "robots.txt").write_text(f"User-agent: *\nAllow: /\nSitemap: {base()}sitemap.xml\n", encoding="utf-8")
    if (lost := site / "404.html").exists():
        lost.write_text(at_any_depth(lost.read_text(encoding="utf-8"), f"{cfg.doc_baseurl.rstrip('/')}/"), encoding="utf-8")
    return lacking(site)


def lacking(site: Path) -> list[str]:
    "What visitors would miss: a title, a description, a twin, a file that the page offers"
    wrong = [f"{name} is missing" for name in ("404.html", "llms.txt", "sitemap.xml", "_static/card.png") if not (site / name).exists()]
    for name in found(site):
        html = (site / f"{name}.html").read_text(encoding="utf-8")
        wrong += [f"{name}.html has no {what}" for what, said in zip(("title", "description"), read_head(site / f"{name}.html")) if not said]
        offered = re.findall(r'<a\s(?=[^>]*class="page-offer")[^>]*href="(?![a-z]+:)([^"#]+)"', html)
        wrong += [f"{name}.html offers {file}, which is missing" for file in {*offered, f"{posixpath.basename(name)}.md"}
                  if not (site / posixpath.dirname(name) / file).exists()]
    return wrong


# --- in every page ---

def description(doctree: nodes.document | None) -> str:
    "The line below a page's title, or its first paragraph, or else what the project is"
    for kind in (nodes.block_quote, nodes.paragraph):
        if doctree and (node := next(iter(doctree.findall(kind)), None)): return " ".join(node.astext().split())[:300]
    return get_config().description


def links_of(name: str) -> list[tuple[str, str]]:
    "What a page offers about itself: its source, editing it, the notebook, its twin"
    cfg, here, file = get_config(), posixpath.basename(name), source(name)
    links = [(text, f"{cfg.git_url}/{verb}/{cfg.branch}/{file}") for text, verb in (("View source", "blob"), ("Edit", "edit")) if file]
    if file and file.endswith(".ipynb"): links.append(("Download this notebook", f"{here}.ipynb"))
    return [*links, ("Markdown", f"{here}.md")] if name not in NO_PAGES else []


def about_page(app, pagename, templatename, context, doctree):
    "Tags for search engines and for chats, and the links that _templates/page-links.html shows"
    title = re.sub(r"<.*?>", "", context.get("title") or get_config().title)
    tags = {'name="description"': description(doctree), 'property="og:title"': title, 'property="og:type"': "website",
            'property="og:site_name"': get_config().title, 'property="og:description"': description(doctree),
            'property="og:url"': f"{base()}{pagename}.html", 'property="og:image"': f"{base()}_static/card.png",
            'property="og:image:width"': "1200", 'property="og:image:height"': "630", 'name="twitter:card"': "summary_large_image"}
    context["metatags"] = context.get("metatags", "") + "".join(f'\n<meta {key} content="{escape(text)}" />' for key, text in tags.items())
    if doctree and pagename not in NO_PAGES and not source(pagename):
        (made := Path(app.outdir) / f"{pagename}.md").parent.mkdir(parents=True, exist_ok=True)
        made.write_text(twin_of(doctree, app), encoding="utf-8")
    context["page_links"] = links_of(pagename)
    context["project_links"] = [(title, context["pathto"](page)) for title, page in
                                (("Changelog", "changelog"), ("Contributing", "contributing"), ("License", "license"))]
    context["project_links"].append(("llms.txt", context["pathto"]("llms.txt", 1)))


def setup(app) -> dict:
    app.connect("html-page-context", about_page)
    return {"parallel_read_safe": True}

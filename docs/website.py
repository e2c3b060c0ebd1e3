"""Build the site: `python docs/website.py` makes _docs/ from nbs/, in the order of nbs/sidebar.yml.

Whatever is wrong fails the build: a page that the sidebar names and nobody wrote, a notebook that it does not name, a
broken link, anything that a reader's browser would have to fetch from elsewhere. `--draft` builds what there is.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import visitors
import yaml
from bridge import BridgeError, Page, convert, finish, link_targets, markdown_cell, modules, notebooks
from nbdev.config import get_config
from reference import mark_module, toctree, write_reference
from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parents[1]
NBS, SOURCES, SITE = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"


@dataclass
class Section:
    "A node of the sidebar: a title, and pages or sections below it"
    title: str
    items: list[str | Section]

    def pages(self) -> list[str]:
        return [page for item in self.items for page in (item.pages() if isinstance(item, Section) else [item])]

    @property
    def name(self) -> str:
        "Its index page: in the folder that its pages share, or in one of its own"
        folders = [os.path.dirname(os.path.dirname(i.name) if isinstance(i, Section) else i) for i in self.items]
        folder = os.path.commonpath(folders) if folders else ""
        return f"{folder or re.sub(r'[^a-z0-9]+', '-', self.title.lower())}/index"


def read_sidebar(contents: list | str) -> list[str | Section]:
    "The entries of sidebar.yml, which are Quarto's: notebooks, sections, or a pattern instead of a list"
    if isinstance(contents, str): contents = sorted(p.relative_to(NBS).as_posix() for p in NBS.glob(contents))
    return [Section(item["section"], read_sidebar(item["contents"])) if isinstance(item, dict) else item.removesuffix(".ipynb")
            for item in contents]


def compare(listed: list[str], written: set[str]) -> list[str]:
    "What is wrong between the sidebar and the notebooks"
    return ([f"nbs/sidebar.yml names {page}.ipynb, which nobody has written" for page in listed if page not in written]
            + [f"nbs/{page}.ipynb is not in nbs/sidebar.yml" for page in sorted(written - set(listed))]
            + [f"nbs/sidebar.yml names {page}.ipynb twice" for page in sorted({p for p in listed if listed.count(p) > 1})])


def write_index(section: Section, pages: dict[str, Page]) -> str | None:
    "Write a section's index page and those below it; returns its name, or none where nothing is written yet"
    cards, names = [], []
    for item in section.items:
        name = write_index(item, pages) if isinstance(item, Section) else item if item in pages else None
        if not name: continue
        title, text = (item.title, ", ".join(pages[p].title for p in item.pages() if p in pages)) if isinstance(item, Section) \
            else (pages[item].title, pages[item].description)
        cards += [f":::{{grid-item-card}} {title}", f":link: /{name}", ":link-type: doc", "", text, ":::"]
        names.append(name)
    if not names: return None
    target = SOURCES / f"{section.name}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join([f"# {section.title}", "", "::::{grid} 1 1 2 2", ":gutter: 3", "", *cards, "::::", "", toctree([f"/{name}" for name in names])]))
    return section.name


def inherited(symbols: dict[str, dict], urls: dict[str, str]) -> dict[str, str]:
    "The methods that a class has from its layers, as if it had defined them: by full name, where they would be documented"
    also = {}
    for module, found in symbols.items():
        for name in found:
            kind = vars(import_module(module)).get(name.removeprefix(f"{module}."))
            for base in kind.__mro__[1:] if isinstance(kind, type) else ():
                also |= {f"{name}.{attribute}": f"{urls[name]}.{attribute}" for attribute in vars(base)
                         if f"{name}.{attribute}" not in urls and f"{base.__module__}.{base.__qualname__}.{attribute}" in urls}
    return also


def write_sources(sidebar: list[str | Section], pages: dict[str, Page]) -> None:
    "Everything that Sphinx reads"
    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.copytree(NBS, SOURCES, ignore=shutil.ignore_patterns("*.ipynb", "*.yml", ".*", "_*"))
    top = [name for item in sidebar if (name := write_index(item, pages) if isinstance(item, Section) else item in pages and item)]
    pages.setdefault("index", Page("index", "", "", [markdown_cell("# Draft")], set()))
    pages["index"].cells.append(markdown_cell(toctree([f"/{name}" for name in top if name != "index"])))
    (SOURCES / "404.md").write_text(visitors.NOT_FOUND, encoding="utf-8")
    symbols = import_module(f"{get_config().lib_path.name}._modidx").d["syms"]
    urls = {name: url for found in symbols.values() for name, (url, _) in found.items()}
    urls |= inherited(symbols, urls)
    labels = set().union(*(page.labels for page in pages.values()))
    homes = {module: page for module, page in modules(notebooks(NBS), get_config().lib_path.name).items() if page in pages}
    for module, page in homes.items(): pages[page].cells.insert(1, mark_module(module, pages[page].description))
    write_reference(SOURCES, {page.name: page.title for page in pages.values()}, urls, labels)
    for page in pages.values():
        targets = link_targets(urls, labels, set(pages), page.name) | {module: f"/{home}.ipynb" for module, home in homes.items()}
        notebook = finish(page, targets)
        (SOURCES / f"{page.name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


def fetched_from_elsewhere(site: Path) -> list[str]:
    "Scripts, styles, fonts and pictures that a page would load over the network"
    loads = re.compile(r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?((?:https?:)?//[^"' >]+)|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?((?:https?:)?//[^"' >]+)"""
                       r"""|@import\s+(?:url\()?["']?((?:https?:)?//[^"')]+)|url\(["']?((?:https?:)?//[^"')]+)""")
    return [f"{path.relative_to(site)} loads {''.join(m.groups(''))}" for path in sorted(site.rglob("*"))
            if path.suffix in (".html", ".css") for m in loads.finditer(path.read_text(encoding="utf-8"))]


# From npm, once, into .tools/: a package, its file, and the file's SHA-256. Without npm the site works, as said here.
SCRIPTS = {
    "mermaid.tiny.js": ("@mermaid-js/tiny@11.17.2", "dist/mermaid.tiny.js", "7a644017d37f93c8359790884e6b67fb1f747c78eb20475952404bd87190a3f8",
                        "diagrams stay text"),
    "minisearch.js": ("minisearch@7.2.0", "dist/umd/index.js", "03c27931eb603af1d3358579e9885eafdb6a2f5fa9929557b3e77d7e99d06d03",
                      "the search answers on a page of its own, not as one types"),
}


def script(name: str) -> Path | None:
    "A script of others that the site uses, checked; none where npm is missing, which fetches it"
    package, member, digest, without = SCRIPTS[name]
    path = ROOT / ".tools" / name
    if path.exists(): return path
    if not (npm := shutil.which("npm")): return print(f"docs: {without}: npm, which fetches {package}, is not installed")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([npm, "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as packed: content = packed.extractfile(f"package/{member}").read()
    if hashlib.sha256(content).hexdigest() != digest: raise BridgeError(f"{package} is not what it was; see what changed, and SCRIPTS in website.py")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def build(draft: bool) -> list[str]:
    "Returns what went wrong, and nothing where the site is good"
    sidebar = read_sidebar(yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])
    listed = Section("", sidebar).pages()
    written = notebooks(NBS)
    wrong = compare(listed, set(written))
    if wrong and not draft: return wrong
    for problem in wrong: print(f"draft: {problem}")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        paths = [written[page] for page in listed if page in written]
        pages = {page.name: page for page in pool.map(convert, paths, [NBS] * len(paths))}
    pages |= visitors.project_pages()
    sidebar.append(Section("Project", list(visitors.PROJECT)))
    told = visitors.tell(pages)
    visitors.lay_out(pages)
    write_sources(sidebar, pages)
    shutil.rmtree(SITE, ignore_errors=True)
    strict = [] if draft else ["--fail-on-warning"]
    status = sphinx(["-q", "-E", *strict, "-b", "html", "-c", str(ROOT / "docs"), "-d", str(SOURCES / ".doctrees"), str(SOURCES), str(SITE)])
    shutil.rmtree(ROOT / "jupyter_execute", ignore_errors=True)  # MyST-NB's copy of the notebooks
    for path in filter(None, map(script, SCRIPTS)): shutil.copy(path, SITE / "_static")
    (SITE / ".nojekyll").touch()  # the host would leave out _static/
    return ["Sphinx found the above"] * bool(status) + visitors.publish(SITE, sidebar, told) + fetched_from_elsewhere(SITE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", action="store_true", help="build the pages that are written; report what is missing, and go on")
    try: wrong = build(parser.parse_args().draft)
    except BridgeError as error: wrong = [str(error)]
    for problem in wrong: print(f"docs: {problem}", file=sys.stderr)
    if not wrong: print(f"The site is in {SITE.relative_to(ROOT)}/index.html")
    sys.exit(bool(wrong))

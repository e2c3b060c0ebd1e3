"""From notebooks to Sphinx sources: what nbdev leaves to Quarto, done for MyST-NB.

nbdev's own processors do the first half (front matter, directives, `show_doc`); what is here turns the result, cell by
cell, into what MyST-NB understands. `website.py` puts the pages together into a site.
"""
from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import import_module
from itertools import takewhile
from pathlib import Path

from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults, exec_show_docs

EXPORT = {"export", "exports", "exporti"}


class BridgeError(Exception):
    "Something that the site cannot show; the message says where it is and what to do"


# --- text ---

CODE = re.compile(r"^ *(```+|~~~+).*?^ *\1 *$|(`+)(?!`).+?(?<!`)\2(?!`)", re.M | re.S)
CALLOUT = re.compile(r"^::: *\{\.callout-(\w+)([^}]*)\} *\n(.*?)^::: *$", re.M | re.S)
DIAGRAM = re.compile(r"^```mermaid *\n(.*?)^``` *$", re.M | re.S)
NAME_OR_LINK = re.compile(r"\[[^\]\n]*\]\([^)\n]*\)|``.+?``|`([A-Za-z_][\w.]*)(\(\))?`")
MATHS = re.compile(r"\$\$|\\\(|\\\[|(?<![\w\\$])\$(?=\S)[^$\n]*[^\s$]\$(?!\w)")


def read_callout(m: re.Match) -> tuple[str, str, str, bool]:
    "A callout's kind, title (or nothing), body, and whether it begins collapsed"
    kind, options, body = m.groups()
    title = re.search(r'title="([^"]*)"', options)
    if not title and (title := re.match(r"\s*#+ +(.*)\n", body)): body = body[title.end():]
    return kind, title[1] if title else "", body.strip(), 'collapse="true"' in options


def callouts(text: str) -> str:
    "Quarto's callouts as MyST's admonitions"
    def admonition(m):
        kind, title, body, collapsed = read_callout(m)
        head = [f":::{{admonition}} {title}", f":class: {kind}"] if title else [f":::{{{kind}}}"]
        return "\n".join([*head, *[":collapsible: closed"] * collapsed, "", body, ":::"])
    return CALLOUT.sub(admonition, text)


def diagrams(text: str) -> str:
    "Fences of Mermaid, which diagrams.js draws"
    return DIAGRAM.sub(lambda m: f'```{{raw}} html\n<pre class="mermaid">\n{escape(m[1], quote=False)}</pre>\n```', text)


def doclinks(text: str, targets: dict[str, str]) -> str:
    "Backticked names that are documented somewhere, as links; headings, code and what is a link already stay"
    def link(m):
        to = targets.get(m[1]) or targets.get(f"{m[1]}{m[2] or ''}")
        return f"[{m.group()}]({to})" if to else m.group()
    fenced, lines = False, []
    for line in text.split("\n"):
        if re.match(r" *(```|~~~)", line): fenced = not fenced
        lines.append(line if fenced or line.startswith(("#", "    ")) else NAME_OR_LINK.sub(link, line))
    return "\n".join(lines)


def check_maths(text: str, page: str) -> None:
    "The site typesets no formulas: better to say so than to print dollars"
    if m := MATHS.search(CODE.sub("", text)):
        raise BridgeError(f"nbs/{page}.ipynb: the site has no maths, so write {m.group()!r} in words, or as code")


# --- names ---

def label(page: str, symbol: str) -> str:
    "What Sphinx calls the place on `page` where `symbol` is documented"
    return f"{page}:" + re.sub("[A-Z]", lambda m: f"^{m[0].lower()}", symbol)  # Sphinx ignores case: `Backend` is not `backend`


def labelled(text: str, name: str) -> str:
    "What `show_doc` printed, with a label on its heading"
    return re.sub(r"^(?=#+ )", f"({name})=\n", text, count=1, flags=re.M)


@cache
def variables() -> set[str]:
    "The names of all parameters and attributes of the package"
    nodes = [node for path in get_config().lib_path.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return {n.arg for n in nodes if isinstance(n, ast.arg)} | {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def as_called(name: str) -> str:
    "How a function of another page must be written to become a link: `rows` may be any column or parameter, so `rows()`"
    return f"{name}()" if re.fullmatch(r"[a-z]+|_[a-z_]+", name) or name in variables() else name


def own_parameters(text: str) -> set[str]:
    "The parameters and fields of what `show_doc` printed, by their signature and table: in its text they are no other page's functions"
    if not (code := re.search(r"^```python\n(.*?)^```", text, re.M | re.S)): return set()
    return {*re.findall(r"\b([a-z_]\w*)(?=\s*[:=,)])", code[1]), *re.findall(r"^\| `\**(\w+)`", text, re.M)}


def link_targets(urls: dict[str, str], labels: set[str], pages: set[str], here: str) -> dict[str, str]:
    """Where each name leads: to its own label, else to its class, else to its page

    `urls` is nbdev's index of full names, `{"lib.pool.Pool.find": "pool.html#pool.find"}`. A name may be written without
    its module where one page alone has it, or the page `here` does; otherwise it leads nowhere.
    """
    full, short = {}, {}
    for name, url in urls.items():
        page, anchor = url.split(".html#")
        if page not in pages: continue
        symbol = name[-len(anchor):]  # the anchor is the symbol in lower case
        at = [l for l in (label(page, symbol), label(page, symbol.partition(".")[0])) if l in labels]
        full[name] = f"#{at[0]}" if at else f"/{page}.ipynb"
        short.setdefault(symbol, {})[page] = full[name]
    clear = {as_called(name): next(iter(where.values())) for name, where in short.items() if len(where) == 1}
    own = {name: where[here] for name, where in short.items() if where.get(here, f"/{here}.ipynb") != f"/{here}.ipynb"}
    return clear | own | full


# --- notebooks ---

@dataclass
class Page:
    "A notebook on its way to the site"
    name: str  # its path under nbs/, without suffix: "storage/pool/memory"
    title: str
    description: str
    cells: list[dict]
    labels: set[str]


class KeepTitle(FrontmatterProc):
    "Reads the title cell as front matter but leaves it on the page, with the paragraph below the title"
    def _update(self, f, cell):
        text = cell.source
        super()._update(f, cell)
        if cell.source is None and cell.cell_type == "markdown": cell.source = re.sub(r"^- +[\w-]+: .*\n?", "", text, flags=re.M)


class RunShowDocs(exec_show_docs):
    "Runs imports and `show_doc`, but for those that a flag of tests marks; exported names come from the package, where their source can be found"
    def begin(self):
        super().begin()
        self.left_out = EXPORT | {*get_config().tst_flags.split()}  # with a flag, they need what may not be installed
        for cell in self.nb.cells:
            if "default_exp" in cell.directives_:
                module = f"{get_config().lib_path.name}.{cell.directives_['default_exp'][0]}".removesuffix(".__init__")
                self.k.user_ns.update(vars(import_module(module)))

    def __call__(self, cell):
        if cell.cell_type != "code" or self.left_out & cell.directives_.keys(): return
        if not (only_imports(cell) or "show_doc(" in cell.source): return
        stored = cell.get("outputs")
        try: super().__call__(cell)
        except Exception:
            if not stored: raise  # else it shows something that the notebook made itself, and printed when it ran
            cell.outputs = stored


def only_imports(cell) -> bool:
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.parsed_() or [None])


def processors(run: bool = True) -> list:
    "nbdev's processors, but for those that link to another site or drop the cells a reader came for"
    without = {"insert_warning", "rm_export", "add_links", "add_fold", "mv_exports", "" if run else "exec_show_docs"}
    instead = {"FrontmatterProc": KeepTitle, "exec_show_docs": RunShowDocs}
    return [instead.get(p.__name__, p) for p in FilterDefaults().procs() if p.__name__ not in without]


def code_cell(cell, documented: bool = False) -> dict | None:
    "A code cell as MyST-NB should show it; none where there is nothing to show"
    options = {name.rstrip(":"): " ".join(value).strip("'\"").lower() for name, value in cell.directives_.items()}
    source = re.sub(r"\A(#\|.*(\n|\Z))+", "", cell.source).strip()
    if not source or options.get("include") == "false": return None
    exported = bool(EXPORT & options.keys())
    # What the reference says above need not be read twice; helpers, which it leaves out, are worth a look.
    fold = exported and "exports" not in options and (documented or only_imports(cell))
    hidden = {"hide-input": options.get("code-fold", str(fold).lower()) == "true", "remove-input": options.get("echo") == "false",
              "remove-output": options.get("output") == "false", "exported": exported}
    metadata = {"tags": [tag for tag, on in hidden.items() if on]}
    if only_imports(cell): metadata["mystnb"] = {"code_prompt_show": "Imports", "code_prompt_hide": "Imports"}
    if said := next((" ".join(value) for name, value in cell.directives_.items() if name.rstrip(":") == "fig-alt"), ""):
        metadata["mystnb"] = {"image": {"alt": said}}  # what a picture shows, for those who do not see it
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": cell.get("outputs", []), "execution_count": None}


def notebook(cells: list[dict]) -> dict:
    metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}


def markdown_cell(source: str) -> dict: return {"cell_type": "markdown", "metadata": {}, "source": source}


def shown(cell) -> tuple[str, str] | None:
    "The symbol that a `show_doc` cell documents, and the Markdown that it printed"
    if cell.cell_type != "code" or "show_doc(" not in cell.source: return None
    for output in cell.get("outputs", []):
        text = "".join(output.get("data", {}).get("text/markdown", ""))
        if m := re.search(r"^#+ `([^`]+)`", text, re.M): return m[1], text


@dataclass
class Code:
    "A code cell as a reader sees it"
    id: str
    source: str
    directives: dict[str, list[str]]
    folded: bool  # Behind a title that has to be clicked


def code_shown(path: Path) -> list[Code]:
    "The code that the page of a notebook shows, in order: what a reader can copy from it; in place of `show_doc` it shows the reference"
    cells = []
    for cell in NBProcessor(nb=read_nb(path), procs=processors(run=False), process=True).nb.cells:
        if cell.cell_type != "code" or "show_doc(" in cell.source or not (code := code_cell(cell)): continue
        tags = code["metadata"]["tags"]
        if "remove-input" not in tags: cells.append(Code(cell.id, code["source"], cell.directives_, "hide-input" in tags))
    return cells


def notebooks(root: Path) -> dict[str, Path]:
    "Every page that is written, by its name"
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.ipynb"))
            if not any(part.startswith((".", "_")) for part in path.relative_to(root).parts)}


def modules(pages: dict[str, Path], package: str) -> dict[str, str]:
    "The page that each module is written on, by the module's full name"
    found = {page: re.search(r'"#\| *default_exp ([\w.]+)', path.read_text(encoding="utf-8")) for page, path in pages.items()}
    return {f"{package}.{m[1]}".removesuffix(".__init__"): page for page, m in found.items() if m}


def convert(path: Path, root: Path) -> Page:
    "One notebook; in a process of its own, because nbdev's shell replaces `__main__`"
    name = path.relative_to(root).with_suffix("").as_posix()
    nb = NBProcessor(nb=read_nb(path), procs=processors(), process=True).nb
    if not nb.frontmatter_.get("title"): raise BridgeError(f"nbs/{name}.ipynb: begin it with a Markdown cell '# Title'")
    asked = {doc[0] for cell in nb.cells if not cell.get("has_sd") and (doc := shown(cell))}
    cells, labels = [], set()
    for i, cell in enumerate(nb.cells):
        if cell.get("has_sd") or cell.cell_type == "raw": continue
        # nbdev puts what an exported cell defines behind it, last first; a reader wants it in order, and before the source.
        defined = [doc for c in takewhile(lambda c: c.get("has_sd"), nb.cells[i + 1:]) if (doc := shown(c)) and doc[0] not in asked]
        itself = shown(cell)
        for symbol, text in [*reversed(defined), *[itself] * bool(itself)]:
            labels.add(label(name, symbol))
            cells.append(markdown_cell(labelled(text, label(name, symbol))) | {"metadata": {"reference": True}})
        if cell.cell_type == "markdown": cells.append(markdown_cell(cell.source))
        elif not itself and (code := code_cell(cell, documented=bool(defined))): cells.append(code)
    front = nb.frontmatter_
    return Page(name, front["title"], front.get("description", ""), json.loads(json.dumps(cells)), labels)


def finish(page: Page, targets: dict[str, str]) -> dict:
    "The page as a notebook for MyST-NB, its names linked"
    for cell in page.cells:
        if cell["cell_type"] == "markdown":
            check_maths(cell["source"], page.name)
            own = own_parameters(cell["source"]) if cell["metadata"].get("reference") else set()
            cell["source"] = doclinks(callouts(diagrams(cell["source"])), {name: to for name, to in targets.items() if name not in own})
    return notebook(page.cells)

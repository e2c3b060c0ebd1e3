"""Make README.md from nbs/index.ipynb: `python docs/readme.py`.

A git host shows what is in the notebook: its text, code and printed outputs. Links between notebooks lead to the site,
pictures to their files under nbs/.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nbformat
from bridge import (CALLOUT, BridgeError, as_called, code_cell, doclinks, markdown_cell, modules, notebook, notebooks, processors,
                    read_callout)
from execnb.nbio import read_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor
from traitlets.config import Config
from visitors import unfenced

ROOT = Path(__file__).resolve().parents[1]
NOTICE = "<!-- Made from nbs/index.ipynb by `make readme`; edit that. -->"


def alerts(text: str) -> str:
    "Quarto's callouts as the alerts of a git host"
    def alert(m):
        kind, title, body, _ = read_callout(m)
        lines = [f"[!{kind.upper()}]", *([f"**{title}**", ""] if title else []), *body.splitlines()]
        return "\n".join(f"> {line}".rstrip() for line in lines)
    return CALLOUT.sub(alert, text)


def links(text: str, site: str) -> str:
    "Links to notebooks lead to the `site`, pictures to their files"
    text = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:)", r"\1nbs/", text)
    return re.sub(r"(?<!!)(\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\()(?![a-z]+:)([^)\s#]+)\.ipynb\b", rf"\1{site}/\2.html", text)


def readme(index: Path) -> str:
    cfg = get_config()
    lookup = NbdevLookup(incl_libs=cfg.lib_name)
    site = f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/")
    urls = {as_called(name): lookup.doc(name) for name in lookup.syms}
    urls |= {name: f"{site}/{page}.html" for name, page in modules(notebooks(ROOT / "nbs"), cfg.lib_path.name).items()}
    cells = []
    for cell in NBProcessor(nb=read_nb(index), procs=processors(run=False), process=True).nb.cells:
        if cell.cell_type == "markdown":
            cells.append(markdown_cell(doclinks(links(alerts(unfenced(cell.source)), site), urls)))
        elif cell.cell_type == "code" and (code := code_cell(cell)): cells.append(code)
    hide = {"enabled": True, "remove_input_tags": {"remove-input"}, "remove_all_outputs_tags": {"remove-output"}}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=hide))
    text, resources = exporter.from_notebook_node(nbformat.reads(json.dumps(notebook(cells)), as_version=4))
    if resources.get("outputs"):
        raise BridgeError(f"{index.name} prints a picture; a README needs it as a file: save it in nbs/images/ and show it with ![…](images/…)")
    text = re.sub(r"<style.*?</style>\n?", "", text, flags=re.S)  # a git host prints a frame's style sheet as text
    return f"{NOTICE}\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    try: (ROOT / "README.md").write_text(readme(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
    except (BridgeError, FileNotFoundError) as error: sys.exit(f"readme: {error}")

"""What the search of the site knows: a Sphinx extension that gathers prose and signatures, section by section and symbol by symbol.

Code of cells and what they print is left out, of Sphinx's own search, too. search.js looks things up as one types.
"""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterator

from docutils import nodes
from sphinx import addnodes

DOCUMENTS = "search-documents.js"
LEFT_OUT = (nodes.section, addnodes.desc, addnodes.toctree, nodes.raw, nodes.title, nodes.thead, nodes.comment)
SKIPPED = {"no-search", "where"}  # classes: the code of cells; where a symbol is explained


def leave_out_cells(app: Any, doctree: nodes.document) -> None:
    "Sphinx's own index skips what has this class"
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code": cell["classes"].append("no-search")


def text_of(node: nodes.Element) -> str:
    "The prose of a node: without sections and symbols inside it, which are found by themselves, nor cells"
    def parts(node: nodes.Node) -> Iterator[str]:
        if isinstance(node, nodes.Text): yield str(node)
        elif isinstance(node, nodes.Element) and not isinstance(node, LEFT_OUT) and SKIPPED.isdisjoint(node["classes"]):
            for child in node.children: yield from parts(child)
            if isinstance(node, (nodes.TextElement, nodes.entry)): yield " "
    return " ".join("".join(text for child in node.children for text in parts(child)).split())


def sections(doctree: nodes.document) -> Iterator[dict[str, Any]]:
    "Every section of a page; the first is the page"
    for i, section in enumerate(doctree.findall(nodes.section)):
        title = next(section.findall(nodes.title)).astext()
        yield {"title": title, "at": f"#{section['ids'][0]}" if i else "", "text": text_of(section), "kind": "section" if i else "page", "name": ""}


def symbols(doctree: nodes.document) -> Iterator[dict[str, Any]]:
    "Every class, method and function of a page of the reference; what is inherited has no text of its own"
    for desc in doctree.findall(addnodes.desc):
        signature = next(desc.findall(addnodes.desc_signature))
        if desc["domain"] != "py" or not signature.get("ids"): continue
        inherited = "inherited" in desc.parent.get("classes", ())
        text = "" if inherited else text_of(next(desc.findall(addnodes.desc_content)))
        kind = "inherited" if inherited else "class" if desc["objtype"] in ("class", "exception") else "symbol"
        yield {"title": signature["fullname"], "at": f"#{signature['ids'][0]}", "text": f"{signature.astext()} {text}", "kind": kind,
               "name": signature["fullname"].rpartition(".")[2]}


def gather(app: Any, doctree: nodes.document, docname: str) -> None:
    "Called for each page as it is written"
    if app.builder.format != "html": return
    found, known = list(sections(doctree)), list(symbols(doctree))
    page = found[0]["title"] if found else ""
    if any(symbol["title"] == page for symbol in known): found = found[1:]  # the page of a class is the class
    found += known
    for document in found: document |= {"page": "" if document["kind"] == "page" else page, "url": f"{app.builder.get_target_uri(docname)}{document.pop('at')}"}
    app.search_documents[docname] = found


def write(app: Any, exception: Exception | None) -> None:
    "A script, not JSON: a browser that reads the site from a folder may load it"
    if exception or app.builder.format != "html": return
    documents = [document for name in sorted(app.search_documents) for document in app.search_documents[name]]
    (Path(app.outdir) / "_static" / DOCUMENTS).write_text(f"searchDocuments = {json.dumps(documents, ensure_ascii=False)};\n", encoding="utf-8")


def read(site: Path) -> list[dict[str, Any]]:
    "The documents of a built site"
    return json.loads(re.sub(r"\AsearchDocuments = |;\n\Z", "", (site / "_static" / DOCUMENTS).read_text(encoding="utf-8")))


def setup(app: Any) -> dict[str, bool]:
    app.search_documents = {}
    app.connect("doctree-read", leave_out_cells)
    app.connect("doctree-resolved", gather)
    app.connect("build-finished", write)
    app.add_js_file("search.js", defer="defer")
    app.add_css_file("search.css")
    return {"parallel_read_safe": True, "parallel_write_safe": False}

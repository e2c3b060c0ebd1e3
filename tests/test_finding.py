"""Whoever looks for something on the site finds it: in the reference, in objects.inv, by a link, by the search

What needs a built site is said loudly not to be tested where there is none.
"""
import inspect
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import data_io_nbdev
import pytest
from loud import unbuilt

reference = pytest.importorskip("reference", reason="the site is built with the dev extra")
import search  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx import addnodes  # noqa: E402
from sphinx.util.inventory import InventoryFile  # noqa: E402

ROOT = Path(__file__).parents[1]

# What one types, and the places one of which must be among the first three hits
WANTED = {
    "sample": ["reference/buffers/Buffer.html#data_io_nbdev.Buffer.sample", "reference/buffers/MemoryBuffer.html#data_io_nbdev.MemoryBuffer.sample"],
    "MemoryBuffer.sample": ["reference/buffers/MemoryBuffer.html#data_io_nbdev.MemoryBuffer.sample"],
    "duplicate timestamp": ["howto/when_something_is_wrong.html", "howto/csv_of_trips.html", "data/core.html"],
    "S3": ["howto/lake_on_s3.html"],
    "next state": ["data/core.html", "data/schema.html", "data/layout.html", "reference/data/Episode.html"],
    "time zone": ["howto/csv_of_trips.html", "data/core.html", "data/layout.html"],
    "delete": ["howto/delete_for_good.html"],
    "resume": ["tutorials/resume.html"],
    "prioritized": ["reference/samplers/Prioritized.html", "howto/prioritized_replay.html"],
    "torch": ["interop/torch.html"],
    "csv": ["howto/csv_of_trips.html"],
    "changelog": ["changelog.html"],
}


@pytest.fixture(scope="module")
def site():
    if not (ROOT / "_docs" / "objects.inv").exists(): unbuilt("finding things on the site: make docs builds it")
    return ROOT / "_docs"


# --- the reference ---

def test_what_users_call_is_found_without_a_list():
    users = {reference.full_name(thing) for thing in reference.for_users()}
    assert {f"data_io_nbdev.{name}" for name in data_io_nbdev._HOME} <= users
    assert {f"data_io_nbdev.{name}" for name in ("storage.pool.writer.Writer", "storage.buffer.batches.Batches", "storage.pool.stats.FieldStats",
                                                 "interop.gymnasium.record", "viz.coverage", "errors.SchemaError")} <= users
    assert not {name for name in users if name.startswith("data_io_nbdev.testing.")} | users & {"data_io_nbdev.errors.require", "data_io_nbdev.viz.Bins"}
    assert {"PoolBackend", "Home", "Sampler", "Commit", "Part"} <= {kind.__name__ for kind in reference.for_authors()}


def test_a_class_has_all_its_methods():
    "Of its layers, of its bases, and those that other modules patch into it; not what a back-end implements"
    found = reference.members(data_io_nbdev.MemoryBuffer)
    assert {"sample", "save_state", "batches", "nbytes", "__len__"} <= found.keys() and "_draw" not in found
    methods = {name for name, _ in inspect.getmembers(data_io_nbdev.MemoryPool, inspect.isroutine) if not name.startswith("_")}
    assert methods <= reference.members(data_io_nbdev.MemoryPool).keys()
    assert {"_head", "_put"} <= reference.members(reference.found("storage.pool.pool.PoolBackend"), hooks=True).keys()


def test_an_entry_says_what_a_method_takes_gives_and_raises():
    urls = {"data_io_nbdev.storage.pool.pool.open_pool": "storage/pool/pool.html#open_pool", "data_io_nbdev.errors.PoolNotFound": "errors.html#poolnotfound"}
    printer = reference.Printer(urls, set(), {"storage/pool/pool": "Pools", "errors": "Errors"})
    text = printer.entry(data_io_nbdev.open_pool, "open_pool")
    assert text.startswith(":::::{py:function} open_pool(url: str")
    assert "| `url` | `str \\| PathLike` |" in text and "- [`PoolNotFound`](/errors.ipynb): " in text
    line = inspect.getsourcelines(data_io_nbdev.open_pool)[1]
    assert "Explained in [Pools](/storage/pool/pool.ipynb), [source](https://" in text and f"/data_io_nbdev/storage/pool/pool.py#L{line})" in text


def test_every_line_of_source_is_where_its_link_leads():
    for thing in reference.for_users():
        lines = inspect.getsource(inspect.getmodule(thing)).splitlines()
        assert thing.__name__ in "".join(lines[reference.line_of(thing) - 1:][:4])  # decorators come first


# --- objects.inv and the index ---

@pytest.fixture(scope="module")
def inventory(site): return InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data


@cache
def anchors(page): return {*re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8"))}


def has_anchor(site, uri):
    page, _, anchor = uri.partition("#")
    return (site / page).exists() and (not anchor or anchor in anchors(site / page))


def test_other_projects_can_link_here(site, inventory):
    wanted = {"py:class": ["MemoryBuffer", "Episode", "storage.pool.writer.Writer"], "py:function": ["open_pool", "viz.coverage"],
              "py:method": ["MemoryBuffer.sample", "Pool.store", "MemoryBuffer.batches", "DaskPool.find"], "py:exception": ["errors.SchemaError"],
              "py:property": ["Pool.version"], "py:module": ["storage.pool.pool", "errors", "testing"]}
    for kind, names in wanted.items():
        for name in names: assert f"data_io_nbdev.{name}" in inventory[kind], (kind, name)
    entries = [(name, item) for kind, items in inventory.items() if kind.startswith("py:") for name, item in items.items()]
    assert {item.project_version for _, item in entries} == {data_io_nbdev.__version__}
    assert [name for name, item in entries if not has_anchor(site, item.uri)] == []


def test_every_public_name_is_in_the_inventory_and_the_index(site, inventory):
    there = {name for kind, items in inventory.items() if kind.startswith("py:") for name in items}
    assert {reference.full_name(thing) for thing in [*reference.for_users(), *reference.for_authors()]} <= there
    index = (site / "genindex.html").read_text(encoding="utf-8")
    assert all(f">{word}" in index for word in ("sample() (data_io_nbdev.MemoryBuffer method)", "open_pool() (in module data_io_nbdev)")) or \
        all(f"#data_io_nbdev.{name}" in index for name in ("MemoryBuffer.sample", "open_pool"))


# --- links ---

def test_no_parameter_leads_to_something_of_the_same_name(site):
    "In a table of parameters the first column has no links"
    wrong = []
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for table in re.findall(r"<table.*?</table>", text, re.S):
            if "<p>Details</p>" not in table: continue
            wrong += [(path.name, cell) for cell in re.findall(r"<tr[^>]*>\s*<td>(.*?)</td>", table, re.S) if "<a " in cell]
    assert wrong == []


def test_the_modules_of_the_first_page_are_links(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    names = re.findall(r'(<a [^>]*>(?:<span[^>]*>)?)?<code[^>]*><span class="pre">(data_io_nbdev\.[\w.]+)</span></code>', text)
    assert names and [name for link, name in names if not link] == []


# --- the search ---

def test_what_the_search_knows():
    "Prose and signatures; not the code of cells, nor what is a section of its own"
    cell = nodes.container("", nodes.literal_block("", "hidden = 1"), nb_element="cell_code")
    inner = nodes.section("", nodes.title("", "Inner"), nodes.paragraph("", "below"), ids=["inner"])
    top = nodes.section("", nodes.title("", "Top"), nodes.paragraph("", "prose"), nodes.paragraph("", "more"), cell, inner, ids=["top"])
    document = nodes.document(None, None, "", top)
    search.leave_out_cells(None, document)
    assert [(d["title"], d["at"], d["text"]) for d in search.sections(document)] == [("Top", "", "prose more"), ("Inner", "#inner", "below")]


def test_a_symbol_s_text_is_its_signature_and_what_it_says():
    signature = addnodes.desc_signature("", "read(n)", ids=["lib.read"], fullname="A.read")
    content = addnodes.desc_content("", nodes.paragraph("", "Reads n"))
    desc = addnodes.desc("", signature, content, domain="py", objtype="method")
    found, = search.symbols(nodes.document(None, None, "", nodes.section("", desc)))
    assert (found["title"], found["name"], found["at"], found["text"]) == ("A.read", "read", "#lib.read", "read(n) Reads n")
    again, = search.symbols(nodes.document(None, None, "", nodes.container("", desc.deepcopy(), classes=["inherited"])))
    assert again["kind"] == "inherited" and again["text"].strip() == "read(n)"


ASK = """
const { makeSearch } = require(process.argv[1]), MiniSearch = require(process.argv[2]);
const { documents, queries } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const search = makeSearch(MiniSearch, documents);
console.log(JSON.stringify(queries.map((query) => search(query).slice(0, 3).map((hit) => hit.url))));
"""


@pytest.fixture(scope="module")
def hits(site):
    "The first three of each word, from the very script that the site has"
    library = site / "_static" / "minisearch.js"
    if not (node := shutil.which("node")): unbuilt("the search: node, which runs its script, is not installed")
    if not library.exists(): unbuilt("the search as one types: npm, which fetches MiniSearch, was not there when the site was built")
    asked = json.dumps({"documents": search.read(site), "queries": [*WANTED]})
    said = subprocess.run([node, "-e", ASK, str(site / "_static" / "search.js"), str(library)], input=asked, capture_output=True, text=True, check=True)
    return dict(zip(WANTED, json.loads(said.stdout)))


@pytest.mark.parametrize("words", WANTED)
def test_what_is_looked_for_is_among_the_first_three(site, hits, words):
    pages = {url.partition("#")[0] for url in hits[words]}
    assert any(url in hits[words] or "#" not in url and url in pages for url in WANTED[words]), hits[words]


def test_the_search_leads_to_anchors_that_exist(site):
    documents = search.read(site)
    assert len({d["url"] for d in documents}) == len(documents) > 500
    assert [d["url"] for d in documents if not has_anchor(site, d["url"])] == []


def test_the_search_does_not_know_outputs_or_code(site):
    texts = " ".join(d["text"] for d in search.read(site))
    assert "import numpy" not in texts and "test_eq(" not in texts

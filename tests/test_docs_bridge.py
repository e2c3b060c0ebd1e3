"""What docs/ makes of a notebook: text, names, cells, the sidebar, and whole pages"""
import io
import json
import shutil
import tarfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

bridge = pytest.importorskip("bridge", reason="the site is built with the dev extra")
import website  # noqa: E402
import readme  # noqa: E402
from execnb.nbio import dict2nb  # noqa: E402
from nbdev.process import NBProcessor  # noqa: E402

URLS = {"lib.pool.Pool": "pool.html#pool", "lib.pool.Pool.find": "pool.html#pool.find", "lib.pool.Pool.tidy": "pool.html#pool.tidy",
        "lib.pool.check": "pool.html#check", "lib.rows.check": "rows.html#check", "lib.rows._row": "rows.html#_row"}
LABELS = {bridge.label("pool", "Pool"), bridge.label("pool", "Pool.find"), bridge.label("rows", "check")}


@pytest.mark.parametrize("quarto, myst", [
    ("::: {.callout-note}\nText\n:::", ":::{note}\n\nText\n:::"),
    (':::{.callout-tip title="Try"}\nText\n:::', ":::{admonition} Try\n:class: tip\n\nText\n:::"),
    ("::: {.callout-warning}\n## Careful\n\nText\n:::", ":::{admonition} Careful\n:class: warning\n\nText\n:::"),
    ('::: {.callout-tip collapse="true"}\nText\n:::', ":::{tip}\n:collapsible: closed\n\nText\n:::"),
    ("plain", "plain"),
])
def test_callouts(quarto, myst): assert bridge.callouts(f"before\n\n{quarto}\n\nafter") == f"before\n\n{myst}\n\nafter"


def test_diagrams():
    text = "before\n\n```mermaid\nflowchart LR\n  a[x < y<br>z] --> `Pool`\n```\n\nafter\n\n```python\n1\n```"
    made = bridge.diagrams(text)
    assert made == ('before\n\n```{raw} html\n<pre class="mermaid">\nflowchart LR\n  a[x &lt; y&lt;br&gt;z] --&gt; `Pool`\n</pre>\n```'
                    '\n\nafter\n\n```python\n1\n```')
    assert bridge.doclinks(made, {"Pool": "#pool"}) == made


def test_names_lead_to_their_label_else_their_class_else_their_page():
    names = bridge.link_targets(URLS, LABELS, {"pool", "rows"}, here="index")
    assert names["Pool.find"] == names["lib.pool.Pool.find"] == "#pool:^pool.find"
    assert names["Pool.tidy"] == "#pool:^pool"
    assert names["_row()"] == "/rows.ipynb"


def test_a_name_that_two_pages_share_is_the_one_of_the_page_it_is_read_on():
    assert not {"check", "check()"} & bridge.link_targets(URLS, LABELS, {"pool", "rows"}, here="index").keys()
    assert bridge.link_targets(URLS, LABELS, {"pool", "rows"}, here="rows")["check"] == "#rows:check"
    assert bridge.link_targets(URLS, LABELS, {"rows"}, here="index")["check()"] == "#rows:check"  # the other is not on the site


def test_a_word_is_another_page_s_function_only_where_it_is_called():
    "`check` may be a parameter or a column; `Pool`, `open_pool` and what this page itself defines cannot be mistaken"
    names = bridge.link_targets(URLS | {"lib.pool.open_pool": "pool.html#open_pool"}, LABELS, {"pool"}, here="index")
    assert {"Pool", "open_pool", "check()", "lib.pool.check"} <= names.keys() and "check" not in names
    assert bridge.doclinks("`check` `check()` `Pool()`", names) == "`check` [`check()`](/pool.ipynb) [`Pool()`](#pool:^pool)"
    own = bridge.link_targets(URLS, LABELS | {bridge.label("pool", "check")}, {"pool"}, here="pool")
    assert own["check"] == "#pool:check" and "check" not in bridge.link_targets(URLS, LABELS, {"pool"}, here="pool")  # to itself it would lead


def test_what_a_parameter_or_attribute_is_called_is_no_link_either():
    assert {"in_one_step", "batch_size"} <= bridge.variables() and bridge.as_called("in_one_step") == "in_one_step()"
    assert bridge.as_called("open_pool") == "open_pool" and bridge.as_called("Pool") == "Pool"


def test_parameters_are_not_linked_where_show_doc_prints_them():
    text = ("### `read`\n\n```python\nread(rows: int, *table, size=max(1, 2)) -> Rows\n```\n\nOf `rows`, see `Pool`.\n\n"
            "|  | Type | Default | Details |\n|---|---|---|---|\n| `rows` | `int` |  | how many of `facts` |\n| `**more` |  |  | all |")
    assert bridge.own_parameters(text) >= {"rows", "table", "size", "more"} and bridge.own_parameters("`rows`") == set()
    page = bridge.Page("here", "", "", [{"cell_type": "markdown", "metadata": {"reference": True}, "source": text}], set())
    linked = bridge.finish(page, {"rows": "#rows", "facts": "#facts", "Pool": "#pool"})["cells"][0]["source"]
    assert "Of `rows`, see [`Pool`](#pool)." in linked and "| `rows` | `int` |  | how many of [`facts`](#facts) |" in linked


def test_modules_lead_to_their_pages():
    pages = bridge.modules(bridge.notebooks(Path(bridge.__file__).parents[1] / "nbs"), "lib")
    assert (pages["lib"], pages["lib.testing"], pages["lib.storage.pool.pool"]) == ("names", "testing/contract", "storage/pool/pool")


@pytest.mark.parametrize("text", ["# `Pool`", "[`Pool`](x.md)", "[the `Pool` of](x.md)", "``a `Pool` b``", "    `Pool`",
                                  "```\n`Pool`\n```", "`pool`", "`Pool.gone`"])
def test_no_link(text): assert bridge.doclinks(text, {"Pool": "#pool:pool"}) == text


def test_doclinks(): assert bridge.doclinks("a `Pool`, `Pool()`.", {"Pool": "#p"}) == "a [`Pool`](#p), [`Pool()`](#p)."


def test_labels_tell_a_class_from_its_function(): assert bridge.label("pool", "Backend") != bridge.label("pool", "backend")


def test_the_label_stands_on_the_heading_and_below_the_anchor():
    text = '<a id="pool"></a>\n\n### `Pool`\n\n```python\n# no heading\n```'
    assert bridge.labelled(text, bridge.label("pool", "Pool")).startswith('<a id="pool"></a>\n\n(pool:^pool)=\n### `Pool`')
    assert bridge.labelled(text, "x").count("(x)=") == 1


@pytest.mark.parametrize("text", ["$x^2$", "see $$x$$", r"\(x\)"])
def test_maths_is_refused(text):
    with pytest.raises(bridge.BridgeError, match="nbs/a/b.ipynb: the site has no maths"): bridge.check_maths(text, "a/b")


@pytest.mark.parametrize("text", ["costs $5", "`$sample$`", "```sh\n$HOME/$USER\n```", "from $5 to $7, say"])
def test_dollars_are_not_maths(text): bridge.check_maths(text, "page")


def cell(source, documented=False):
    nb = NBProcessor(nb=dict2nb(new_notebook(cells=[new_code_cell(source)]))).nb
    return bridge.code_cell(nb.cells[0], documented)


def test_imports_behind_a_flag_are_not_run(tmp_path):
    "They need what may not be installed; other imports are run"
    def built(source):
        cells = [new_markdown_cell("# A page"), *map(new_code_cell, ("from nbdev.showdoc import show_doc", source, "show_doc(sorted)"))]
        nbformat.write(new_notebook(cells=cells), tmp_path / "page.ipynb")
        NBProcessor(tmp_path / "page.ipynb", procs=bridge.processors(), process=True)
    built("#| torch\nimport not_installed")
    with pytest.raises(Exception, match="import not_installed"): built("import not_installed")


@pytest.mark.parametrize("source, documented, tags", [
    ("x = 1", False, set()), ("#| echo: false\nx = 1", False, {"remove-input"}), ("#| output: false\nx = 1", False, {"remove-output"}),
    ("#| code-fold: true\nx = 1", False, {"hide-input"}), ("#| export\ndef _f(): ...", False, {"exported"}),
    ("#| export\ndef f(): ...", True, {"exported", "hide-input"}), ("#| export\nimport os", False, {"exported", "hide-input"}),
    ("#| export\n#| code-fold: false\ndef f(): ...", True, {"exported"}), ("#| exports\ndef f(): ...", True, {"exported"}),
    ("import os", False, set()),
])
def test_how_a_code_cell_is_shown(source, documented, tags):
    shown = cell(source, documented)
    assert set(shown["metadata"]["tags"]) == tags and "#|" not in shown["source"]


@pytest.mark.parametrize("source", ["#| include: false\nx = 1", "#| default_exp pool", ""])
def test_cells_with_nothing_to_show(source): assert cell(source) is None


def test_the_sidebar_and_the_notebooks_name_each_other():
    wrong = website.compare(["index", "gone", "twice", "twice"], {"index", "twice", "new"})
    assert wrong == ["nbs/sidebar.yml names gone.ipynb, which nobody has written", "nbs/new.ipynb is not in nbs/sidebar.yml",
                     "nbs/sidebar.yml names twice.ipynb twice"]


def test_a_section_s_index_is_in_the_folder_that_its_pages_share():
    pools, buffers = website.Section("Pools", ["storage/pool/memory"]), website.Section("Buffers", ["storage/buffer/memory"])
    sections = [pools, website.Section("Storage", [pools]), website.Section("Storage", [pools, buffers]),
                website.Section("More to read", ["errors", "data/core"]), website.Section("None yet", [])]
    assert [s.name for s in sections] == ["storage/pool/index", "storage/index", "storage/index", "more-to-read/index", "none-yet/index"]


def test_what_a_browser_would_fetch(tmp_path):
    (tmp_path / "a.html").write_text('<a href="https://x.org">fine</a> <img src="b.png"> <script src="https://x.org/a.js"></script>')
    (tmp_path / "b.css").write_text("@font-face { src: url(//x.org/f.woff2) }")
    assert website.fetched_from_elsewhere(tmp_path) == ["a.html loads https://x.org/a.js", "b.css loads //x.org/f.woff2"]


def test_scripts_of_others_are_checked_and_can_be_done_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(website, "ROOT", tmp_path)
    monkeypatch.setattr(website.shutil, "which", lambda name: None)
    assert website.script("minisearch.js") is None and "not as one types: npm" in capsys.readouterr().out
    with tarfile.open(tmp_path / "packed.tgz", "w:gz") as packed:
        packed.addfile(tarfile.TarInfo("package/dist/umd/index.js"), io.BytesIO())
    monkeypatch.setattr(website.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(website.subprocess, "run", lambda command, cwd, **options: shutil.copy(tmp_path / "packed.tgz", cwd))
    with pytest.raises(bridge.BridgeError, match="is not what it was"): website.script("minisearch.js")
    assert not (tmp_path / ".tools").exists()


def test_links_of_a_readme():
    text = "[a](data/core.ipynb#x) ![p](images/p.svg) [![b](images/b.svg)](errors.ipynb) [w](https://w.org/n.ipynb)"
    assert readme.links(text, "https://site") == ("[a](https://site/data/core.html#x) ![p](nbs/images/p.svg) "
                                                  "[![b](nbs/images/b.svg)](https://site/errors.html) [w](https://w.org/n.ipynb)")


def test_alerts():
    assert readme.alerts("::: {.callout-note}\n## T\n\none\n\ntwo\n:::") == "> [!NOTE]\n> **T**\n>\n> one\n>\n> two"


@pytest.fixture
def errors_page():
    "A page of this very site, made in a process of its own as the build does"
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    nbs = Path(bridge.__file__).parents[1] / "nbs"
    with ProcessPoolExecutor(1, get_context("spawn")) as pool: return pool.submit(bridge.convert, nbs / "errors.ipynb", nbs).result()


def test_a_page(errors_page):
    texts = ["".join(c["source"]) for c in errors_page.cells]
    assert errors_page.title == "Errors" and errors_page.description.startswith("Every exception")
    assert texts[0].startswith("# Errors\n\n> Every exception") and "DataIOError" in texts[0]  # the paragraph stays
    at = {name: next(i for i, t in enumerate(texts) if f"({bridge.label('errors', name)})=" in t)
          for name in ("SchemaError", "QueryError", "require")}
    assert {bridge.label("errors", name) for name in at} <= errors_page.labels
    assert at["SchemaError"] < at["QueryError"] < at["require"]  # as in the source, which follows
    assert "def require(" in texts[at["require"] + 1] and "| `module` | `str` |" in texts[at["require"]]
    assert not any("default_exp" in t or "show_doc" in t or t.startswith("#|") for t in texts)
    nbformat.validate(nbformat.reads(json.dumps(bridge.finish(errors_page, {})), as_version=4))


def test_a_readme(tmp_path):
    frame = new_output("execute_result", data={"text/html": "<div>\n<style scoped>\n p {}\n</style>\n<table></table>\n</div>"})
    cells = [new_markdown_cell("# Name\n\n> What\n\nWhy: `DataIOError`."), new_code_cell("#| hide\nimport os"),
             new_code_cell("#| echo: false\nx", outputs=[frame])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "index.ipynb")
    text = readme.readme(tmp_path / "index.ipynb")
    assert text.startswith(readme.NOTICE) and "# Name\n\n> What\n\nWhy: [`DataIOError`](https://" in text
    assert "<table>" in text and not any(word in text for word in ("style", "import os", "```"))
    picture = new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    nbformat.write(new_notebook(cells=[*cells, new_code_cell("x", outputs=[picture])]), tmp_path / "index.ipynb")
    with pytest.raises(bridge.BridgeError, match="prints a picture"): readme.readme(tmp_path / "index.ipynb")

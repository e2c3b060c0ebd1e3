"""What visitors expect besides pages: twins in Markdown, notebooks to download, a sitemap, tags, cards and tabs, pictures that are up to date"""
import ast
import json
import re
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest

bridge = pytest.importorskip("bridge", reason="the site is built with the dev extra")
import pictures  # noqa: E402
import visitors  # noqa: E402
import website  # noqa: E402
import yaml  # noqa: E402
from nbdev.config import get_config  # noqa: E402

ROOT = Path(bridge.__file__).parents[1]
CODE = {"cell_type": "code", "metadata": {}, "source": "1 + 1", "outputs": [{"output_type": "execute_result", "data": {"text/plain": "2"}}]}


def page(name, *cells): return bridge.Page(name, name.title(), f"about {name}", [bridge.markdown_cell(f"# {name.title()}\n\n> about {name}"), *cells], set())


HTML = '<title>{0}</title><meta name="description" content="of {0}"/><a class="page-offer" href="{0}.md">M</a><a class="page-offer" href="https://x.org/y">Edit</a>'


@pytest.fixture
def site(tmp_path):
    "A site of three pages and a section, as Sphinx leaves it, with the notebooks of two"
    for name in ("index", "data/core", "data/index", "changelog", "404", "search", "_static/part"):
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / f"{name}.html").write_text(HTML.format(name.split("/")[-1]))
    (tmp_path / "site/_static/card.png").touch()
    for name in ("index", "data/core"):
        (tmp_path / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nbs" / f"{name}.ipynb").write_text(json.dumps({"cells": [name]}))
    return tmp_path / "site"


SECTIONS = ["index", website.Section("Data", ["data/core"]), website.Section("Project", ["changelog"])]


def publish(site): return visitors.publish(site, SECTIONS, visitors.tell({n: page(n) for n in ("index", "data/core", "changelog")}), site.parent / "nbs")


def test_every_page_has_its_place_its_twin_and_its_notebook(site):
    assert publish(site) == []
    urls = [url.text for url in ElementTree.parse(site / "sitemap.xml").iter("{http://www.sitemaps.org/schemas/sitemap/0.9}loc")]
    assert urls == [f"{visitors.base()}{name}.html" for name in ("changelog", "data/core", "data/index", "index")]
    assert (site / "data/core.md").read_text() == "# Data/Core\n\n> about data/core\n"
    assert (site / "data/index.md").read_text() == "# Data\n\n- [Data/Core](core.md): about data/core\n"
    assert json.loads((site / "data/core.ipynb").read_text()) == {"cells": ["data/core"]} and not (site / "changelog.ipynb").exists()
    assert f"## Data\n\n- [Data/Core]({visitors.base()}data/core.md): about data/core\n" in (site / "llms.txt").read_text()


@pytest.mark.parametrize("html, wrong", [
    (HTML.format(""), "core.html has no title"), (HTML.format("core").replace("of core", ""), "core.html has no description"),
    (HTML.format("core").replace("core.md", "core.ipynb.gz"), "core.html offers core.ipynb.gz, which is missing"),
])
def test_what_a_page_lacks(site, html, wrong):
    (site / "data/core.html").write_text(html)
    assert f"data/{wrong}" in publish(site)


def test_a_page_that_nobody_tells_of(site):
    (site / "data/new.html").write_text(HTML.format("new"))
    assert publish(site) == ["data/new.html offers new.md, which is missing"]


def test_links_at_any_depth():
    html = '<html data-content_root="./"> <a href="data/core.html#x"> <a href="#main"> <a href="#"> <a href="https://x.org"> <img src="../_static/a.png">'
    assert visitors.at_any_depth(html, "/base/") == ('<html data-content_root="/base/"> <a href="/base/data/core.html#x"> <a href="#main"> <a href="#"> '
                                                     '<a href="https://x.org"> <img src="/_static/a.png">')


def test_twin():
    hidden = [CODE | {"metadata": {"tags": tags}} for tags in (["remove-input"], ["remove-output"])]
    picture = CODE | {"outputs": [{"output_type": "display_data", "data": {"image/png": "…", "text/plain": "<Figure>"}}]}
    prose = bridge.markdown_cell("::: {.callout-tip}\nSee [a](b/c.ipynb#d)\n:::\n\n![a road](road.svg)")
    text = visitors.twin(page("a", CODE, *hidden, picture, prose))
    code, said = "```python\n1 + 1\n```", "```text\n2\n```"
    assert text == "\n\n".join(["# A", "> about a", code, said, said, code, code, "> **Tip**\n>\n> See [a](b/c.md#d)", "(Picture: a road)"]) + "\n"


CARDS = "::: {.cards}\n- [**One**](a/b.ipynb): the first,\n  at length\n- **Two**: the second\n:::"
TABS = "::: {.panel-tabset}\n**pip**\n\n    pip install x\n\n**uv**\n\n    uv add x\n\n:::"


def test_cards_and_tabs():
    assert visitors.panels(CARDS).split("\n")[3:] == [":::{grid-item-card} One", ":link: a/b", ":link-type: doc", "", "the first,\nat length".split("\n")[0],
                                                      "at length", ":::", ":::{grid-item-card} Two", "", "the second", ":::", "::::"]
    assert visitors.panels(f"a\n\n{TABS}\n\nb") == ("a\n\n::::{tab-set}\n\n:::{tab-item} pip\n\n    pip install x\n\n:::\n:::{tab-item} uv\n\n    uv add x\n\n:::\n::::\n\nb")
    assert visitors.unfenced(f"{CARDS}\n\n{TABS}").count(":::") == 0 and "**uv**" in visitors.unfenced(TABS)


def test_every_notebook_has_a_title_and_a_line_below_it():
    "They are the title and the description of its page"
    without = [name for name, path in bridge.notebooks(ROOT / "nbs").items()
               if not re.match(r"# \S.*\n+(?:- .*\n+)*> \S", "".join(next(c["source"] for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
                                                                           if c["cell_type"] == "markdown")))]
    assert without == []


def test_every_page_has_a_source():
    sidebar = website.read_sidebar(yaml.safe_load((ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])
    for name in [*website.Section("", sidebar).pages(), *visitors.PROJECT]:
        assert (ROOT / visitors.source(name)).exists()
        assert [text for text, _ in visitors.links_of(name)][:2] == ["View source", "Edit"]


def test_the_changelog_and_the_license_are_pages():
    pages = visitors.project_pages()
    texts = {name: p.cells[0]["source"] for name, p in pages.items()}
    assert all(text.startswith(f"# {pages[name].title}\n\n> ") for name, text in texts.items())
    assert "\n## 0.1.0" in texts["changelog"] and "Apache License" in texts["license"] and "](nbs/" not in texts["contributing"]


def test_the_first_page_installs_from_the_repository():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {*re.findall(r"git\+(\S+?)[\"\n]", readme)} == {*re.findall(r"git clone (\S+)", readme)} == {get_config().git_url}


# --- figures ---

def test_the_chart_is_made_of_the_results():
    assert pictures.CHART.read_text(encoding="utf-8") == pictures.chart(pictures.RESULTS.read_text(encoding="utf-8")), "run python docs/pictures.py"


def test_bars_are_batches_a_second():
    results = "Title\n\n| µs a batch | uniform | windows |\n|---|---:|---:|\n| floor: x | 1 | 1 |\n| slow | 1,000 | – |\n| quick | 250 | 20 |\n\n- 2026-01-01, a machine\n- Python 3\n- busy & slow\n"
    assert pictures.batches(results) == {"uniform": {"quick": 4000, "slow": 1000}, "windows": {"quick": 50000}}
    made = pictures.chart(results)
    assert ElementTree.fromstring(made).tag.endswith("svg") and "50,000" in made and "2026-01-01, a machine" in made and "busy &amp; slow" in made
    with pytest.raises(ValueError, match="ms a batch"): pictures.batches(results.replace("µs", "ms"))


def test_the_card():
    png = (pictures.STATIC / "card.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == (1200, 630) and len(png) < 100_000
    assert (pictures.STATIC / "favicon.svg").read_text(encoding="utf-8") == pictures.FAVICON


def test_attacks_are_as_many_as_the_first_page_says():
    "Counted where a test names a plain number of trials; most are carried out for several back-ends, and count once here"
    calls = [node for path in (ROOT / "tests").glob("test_attack_*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "attack"]
    trials = sum(call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant))
    said = re.search(r"more than ([\d,]+) seeded attacks", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    assert trials > int(said.replace(",", ""))

"""The built site in a real browser: every page, wide and narrow, light and dark. `make docs` builds it.

Each page is loaded once, in one tab (several at a time take longer, not shorter): the window and the colours change under it, and
what is wrong is collected for the tests below. A page that is light where it is wide is dark where it is narrow, or the other way round."""
import pytest

from browser import SITE, Heard
from loud import unbuilt
from test_finding import WANTED

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
VIEWS = [((WIDE, "light"), (NARROW, "dark")), ((WIDE, "dark"), (NARROW, "light"))]  # of half the pages, and of the others

# What a page says of itself. Its own scroll: how far it can be moved aside, not what hangs over an edge unseen.
LOOK = """() => {
  const shown = e => e.checkVisibility({visibilityProperty: true});
  const said = e => (e.getAttribute("aria-label") || e.getAttribute("alt") || e.querySelector(":scope > title")?.textContent || "").trim();
  const hidden = e => e.closest("[aria-hidden=true], [role=presentation]");
  scrollTo(1e4, scrollY); const aside = scrollX; scrollTo(0, scrollY);
  const code = [...document.querySelectorAll("div.highlight pre")].filter(shown);
  return {
    theme: document.documentElement.dataset.theme,
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    aside,
    nameless: [...document.querySelectorAll("img, svg")].filter(e => shown(e) && !hidden(e) && (!said(e) || /^\\S+\\.(png|svg|jpe?g)$/.test(said(e))))
      .map(e => e.outerHTML.slice(0, 120)),
    missing: [...document.images].filter(e => shown(e) && e.complete && !e.naturalWidth).map(e => e.src),
    undrawn: [...document.querySelectorAll("pre.mermaid:not(:has(svg))")].map(e => e.textContent.slice(0, 60)),
    cut: code.filter(e => e.scrollWidth > e.clientWidth && !e.closest(".cell_output"))
      .map(e => e.textContent.split("\\n").reduce((a, b) => b.length > a.length ? b : a)),
    buttonless: code.filter(e => !e.closest(".cell_output, .mermaid") && !e.parentElement.querySelector("button.copybtn")).map(e => e.textContent.slice(0, 60)),
  };
}"""


def pages(): return sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if "_static" not in p.relative_to(SITE).parts)


def turned(tab, size, scheme):
    "The page of a tab in another light, and in a window of another size"
    tab.emulate_media(color_scheme=scheme)
    if tab.viewport_size != size: tab.set_viewport_size(size)
    tab.wait_for_function("theme => document.documentElement.dataset.theme == theme", arg=scheme)
    return tab.evaluate(LOOK)


@pytest.fixture(scope="module")
def context(browser, site):
    context = browser.new_context(viewport=WIDE, color_scheme="light", permissions=["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture(scope="module")
def seen(context, site):
    "What each page says, `[page, width, scheme, facts]`, and what was heard meanwhile"
    found, heard, tab = [], Heard(), context.new_page()
    heard.listen(tab, site)
    names = pages()
    for i, name in enumerate([*names[::2], *names[1::2]]):
        tab.goto(site + name)
        if drawn(): tab.wait_for_function("() => !document.querySelector('pre.mermaid:not(:has(svg))')")
        found += [(name, size["width"], scheme, turned(tab, size, scheme)) for size, scheme in VIEWS[2 * i > len(names)][::(-1) ** i]]  # the tab begins as the last page left it
    tab.close()
    return found, heard


def drawn(): return (SITE / "_static" / "mermaid.tiny.js").exists()


def of(seen, fact, widths=(1280, 390)):
    "Pages where a fact is not as empty as it should be"
    return list(dict.fromkeys(f"{page} at {width}: {what}" for page, width, _, facts in seen[0] if width in widths
                              for what in (facts[fact] if isinstance(facts[fact], list) else [facts[fact]] * bool(facts[fact]))))


def test_every_page_was_seen(seen):
    views = [(page, width, scheme) for page, width, scheme, _ in seen[0]]
    assert len(views) == 2 * len(pages()) > 120
    assert {(page, what) for page, *both in views for what in both} == {(page, what) for page in pages() for what in (1280, 390, "light", "dark")}
    for page, _, scheme, facts in seen[0]:
        assert facts["theme"] == scheme, page
        paper, ink = ([int(x) for x in facts[what].removeprefix("rgb(").removesuffix(")").split(",")] for what in ("paper", "ink"))
        assert (sum(paper) > sum(ink) + 300) if scheme == "light" else (sum(ink) > sum(paper) + 300), f"{page}: {ink} on {paper} is not {scheme}"


def test_no_page_complains_or_leaves_the_machine(seen):
    "Of what the theme says of its own doings, errors count"
    assert [said for said in seen[1] if not said[1].startswith("log: [PST]:")] == []


def test_pages_do_not_scroll_sideways(seen): assert of(seen, "aside") == []


def test_every_picture_says_what_it_shows(seen): assert of(seen, "nameless", [1280]) == []


def test_every_picture_is_there(seen):
    assert of(seen, "missing") == []
    if drawn(): assert of(seen, "undrawn") == []


def test_code_fits_its_page(seen): assert of(seen, "cut", [1280]) == []


def test_code_can_be_copied(seen, context, site):
    assert of(seen, "buttonless") == []
    page = context.new_page()
    page.goto(f"{site}tutorials/first_replay.html")
    blocks = page.locator("div.cell_input div.highlight:visible").all()
    assert len(blocks) > 5
    for block in blocks:
        block.hover()
        block.locator("button.copybtn").click()
        assert page.evaluate("navigator.clipboard.readText()").strip() == block.locator("pre").inner_text().strip()
    page.close()


@pytest.fixture(scope="module")
def dialog(context, site):
    "The page of the site's address with its search open, and what was heard"
    if not (SITE / "_static" / "minisearch.js").exists(): unbuilt("the search as one types: npm, which fetches MiniSearch, was not there when the site was built")
    page, heard = context.new_page(), Heard()
    heard.listen(page, site)
    page.goto(f"{site}index.html")
    page.keyboard.press("Control+k")
    yield page.locator("dialog"), heard
    page.close()


@pytest.mark.parametrize("words", WANTED)
def test_search_leads_where_it_should(dialog, site, words):
    (shown, heard), found = dialog, dialog[0].locator(".site-search a")
    field = shown.locator("input[name=q]")
    field.fill("")
    field.press_sequentially(words)
    found.first.wait_for()
    hrefs = [link.evaluate("a => a.href").removeprefix(site) for link in found.all()[:3]]
    assert any(href.partition("#")[0] == place or href == place for href in hrefs for place in WANTED[words]), f"{words!r} leads to {hrefs}"
    assert [said for said in heard if not said[1].startswith("log: [PST]:")] == []

"""The built site: no dead link, nothing undescribed, and whole in a browser with no network."""

from __future__ import annotations

import copy
import functools
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import ROOT
from helpers import as_html
from playwright.sync_api import Browser, Page, Route

import book
import notebooks
import portable

pytestmark = pytest.mark.book

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"])]
VIEWS = {"desktop": (1280, 900), "phone": (390, 844)}
each_page = pytest.mark.parametrize("page", PAGES)
each_chapter = pytest.mark.parametrize("text", notebooks.chapters(), ids=lambda text: text.stem)


@functools.cache
def read(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@functools.cache
def anchors(path: Path) -> set[str]:
    """What a link into this page can name."""
    tags = read(path).select("[id], [name]")
    return {tag[key] for tag in tags for key in ("id", "name") if tag.has_attr(key)}


def broken_links(site: Path, path: Path) -> Iterator[str]:
    """Links of one page to files or anchors of the site that are not there."""
    for tag in read(path).select("[href], [src]"):
        link = urlsplit(tag.get("href") or tag.get("src"))
        if link.scheme or link.netloc:
            continue
        target = (path.parent / unquote(link.path)).resolve() if link.path else path
        if not target.exists() or not target.is_relative_to(site.resolve()):
            yield f"{path.name}: no file {link.path}"
        elif link.fragment and unquote(link.fragment) not in anchors(target):
            yield f"{path.name}: no anchor {link.path}#{link.fragment}"


def test_no_link_inside_the_site_is_dead(site: Path):
    pages = sorted(site.rglob("*.html"))
    pages = [path for path in pages if "_static" not in path.parts]
    assert len(pages) > len(PAGES)
    assert [dead for path in pages for dead in broken_links(site, path)] == []


def test_the_first_page_leads_to_the_book(site: Path):
    first = read(site / "index.html")
    assert first.html["lang"] == "en"
    assert first.a["href"] == f"{TOC['root']}.html"


@each_page
def test_page_is_described(site: Path, page: str):
    html = read(site / f"{page}.html")
    assert html.html["lang"] == "en"
    assert html.title.text.strip()
    assert len(html.select("main article h1")) == 1
    assert html.select_one("#pst-skip-link a[href='#main-content']")
    for image in html.select("main img"):
        assert image.get("alt", "").strip(), image
    for figure in html.select("main article svg"):
        label = figure.get("aria-label") or figure.get("aria-labelledby") or figure.find("title")
        assert label or figure.get("aria-hidden") == "true", "a drawing without a description"


@each_chapter
def test_chapter_opens_on_colab(site: Path, text: Path):
    config = portable.config()["repository"]
    owner_and_name = config["url"].removeprefix("https://github.com/")
    address = (
        f"https://colab.research.google.com/github/{owner_and_name}"
        f"/blob/{config['branch']}/notebooks/{text.stem}.ipynb"
    )
    page = read(site / "notebooks" / f"{text.stem}.html")
    assert page.find("a", href=address)
    assert portable.on_colab(f"notebooks/{text.stem}") == address


@each_chapter
def test_a_page_offers_the_notebook_that_runs_anywhere(site: Path, text: Path):
    page = site / "notebooks" / f"{text.stem}.html"
    link = read(page).select_one("a.btn-download-source-button")
    offered = (page.parent / link["href"]).resolve()
    assert offered.read_bytes() == notebooks.notebook_of(text).read_bytes()


def stored_cells(text: Path) -> list[str]:
    """The Markdown of the notebook that readers open elsewhere."""
    cells = notebooks.stored(text).cells
    return [cell.source for cell in cells if cell.cell_type == "markdown"]


def test_the_reference_shows_every_learner(site: Path):
    """By its file; the page that lists them is made where the package does not lie."""
    text = (site / "book" / "api.html").read_text(encoding="utf-8")
    for path in (ROOT / "metautils" / "learners").glob("[a-z]*.py"):
        assert f'id="metautils.learners.{path.stem}.' in text, f"{path.stem} is missing"


def test_results_are_written_where_pipes_have_another_encoding(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")  # as on Windows
    book.write_results(tmp_path / "_generated" / "results.md")
    assert "\u00a0±\u00a0" in (tmp_path / "_generated" / "results.md").read_text(encoding="utf-8")


@each_chapter
def test_links_of_a_notebook_lead_into_the_site(site: Path, text: Path):
    base = portable.config()["html"]["baseurl"]
    cells = "\n\n".join(stored_cells(text))
    links = [a["href"] for a in BeautifulSoup(as_html(cells), "html.parser").find_all("a")]
    own = [urlsplit(link.removeprefix(base)) for link in links if link.startswith(base)]
    assert own and not [link for link in links if not link.startswith("https://")]
    for link in own:
        assert (site / link.path).is_file(), link.path
        assert not link.fragment or unquote(link.fragment) in anchors(site / link.path), link


@each_chapter
def test_a_notebook_says_what_its_page_says(site: Path, text: Path):
    """Word for word, with the same formulas and the same numbers of equations."""
    page = copy.copy(read(site / "notebooks" / f"{text.stem}.html").select_one("article"))
    for tag in page.select(".cell, .headerlink, .prev-next-area, script"):
        tag.decompose()
    numbers = [tag.extract().get_text() for tag in page.select(".eqno")]
    formulas = [tag.replace_with("0").get_text() for tag in page.select(".math")]
    cells = stored_cells(text)
    cells[0] = re.sub(r"\n\[!\[.*\n", "\n", cells[0])  # the line of links under the title
    there = "\n\n".join(cells)
    assert [f"({n})" for n in re.findall(r"\\tag\{(\d+)\}", there)] == numbers
    written = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", there, re.S)
    assert [bare(a or b) for a, b in written] == [bare(f) for f in formulas]
    prose = as_html(re.sub(r"\$\$.+?\$\$|\$.+?\$", "0", there, flags=re.S))
    assert words(BeautifulSoup(prose, "html.parser")) == words(page)


def bare(formula: str) -> str:
    """A formula without what each side writes around it."""
    inside = re.sub(r"^\\[(\[]|\\[)\]]$|\\tag\{\d+\}|\\(begin|end)\{split\}", "", formula.strip())
    return re.sub(r"\s", "", inside)


def words(page: BeautifulSoup) -> list[str]:
    """What is read on a page, word by word; quotation marks may be curly or straight."""
    text = page.get_text(" ").translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))
    return re.findall(r"\w+|[^\w\s]", text)


@each_page
def test_a_table_is_a_table(site: Path, page: str):
    """A row of bars in running text is Markdown that nobody rendered."""
    text = [p.get_text() for p in read(site / f"{page}.html").select("article p")]
    assert not [line for line in text if line.count(" | ") > 3]


def test_the_repository_address_is_written_once():
    address = notebooks.repository()
    written = [
        path.relative_to(ROOT).as_posix()
        for folder in ("", "book", "metautils", "tools", "tests", ".github/workflows")
        for path in (ROOT / folder).glob("*")
        if path.is_file() and address in path.read_text(encoding="utf-8", errors="ignore")
    ]
    assert written == ["_config.yml"]


def read_by_people() -> Iterator[tuple[str, str]]:
    """The name and the text of each page of the book, and of the README."""
    for path in (*sorted((ROOT / "book").glob("*.md")), ROOT / "README.md"):
        yield path.name, path.read_text(encoding="utf-8")


# "chapter 4", "chapters 2", the file "chapter4.ipynb"; and a line of a drawing, ">4 Prototypical".
TYPED = re.compile(r"\b[Cc]hapters?(?:[ -]|\n)?\d+|<text[^>]*>\s*\d+\.?\s+[A-Z]\w*")


def typed_numbers(text: str) -> list[str]:
    """Where a text counts chapters, which change their places: it links them by title instead."""
    found = [" ".join(match[0].split()) for match in TYPED.finditer(text)]
    column = None
    for line in text.splitlines():
        cells = [re.sub(r"`[^`]*`", "", cell).strip() for cell in line.split("|")]
        if len(cells) < 3:
            column = None
        elif column is None:
            column = next((k for k, c in enumerate(cells) if c.lower() == "chapter"), len(cells))
        elif column < len(cells) and re.search(r"\d", cells[column]):
            found.append(cells[column])
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("You can read chapter 1, {doc}`../notebooks/01_concepts`.", ["chapter 1"]),
        ("After it, chapters 2 and 4 can be read.", ["chapters 2"]),
        ("Chapters\n7 to 9 come after those.", ["Chapters 7"]),
        ("papermill notebooks/02_maml.ipynb chapter4-mine.ipynb", ["chapter4"]),
        ('<text x="20">4 Prototypical Networks</text>', ['<text x="20">4 Prototypical']),
        ("| what | chapter |\n|---|---|\n| a 2 | 4, {doc}`P <06_p>`; 5 |", ["4, {doc}; 5"]),
        ("| what | chapter |\n|---|---|\n| a 2 | {doc}`P <06_p>` |", []),
        ("| chapter |\n|---|\n\n| n |\n|---|\n| 4 |", []),
        ('<text x="82" y="384">0</text>', []),
        ("## Add a chapter\n\n1. Write it.", []),
        ("After this chapter, the next chapter: {doc}`02_maml`, in 30 seconds.", []),
    ],
)
def test_the_check_finds_typed_numbers_of_chapters(text: str, found: list[str]):
    assert typed_numbers(text) == found


def test_chapters_are_linked_by_title_and_not_counted():
    typed = {name: numbers for name, text in read_by_people() if (numbers := typed_numbers(text))}
    assert typed == {}


def test_what_is_in_preparation_is_told_on_one_page():
    assert [n for n, text in read_by_people() if "in preparation" in text.lower()] == ["intro.md"]


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where a server on this machine shows the site."""
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line of log for each."""

    def log_message(self, *args: object) -> None:
        pass


def show(browser: Browser, address: str, page: str, view: str, theme: str) -> tuple[Page, list]:
    """Open a page with no network but the site itself; also all that went wrong."""
    width, height = VIEWS[view]
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    trouble: list[str] = []

    def pass_own(route: Route) -> None:
        if route.request.url.startswith((address, "data:", "blob:")):
            return route.continue_()
        trouble.append(f"asks the network for {route.request.url}")
        return route.abort()

    tab.route("**/*", pass_own)
    tab.on("pageerror", lambda error: trouble.append(f"script error: {error}"))
    tab.on("console", lambda m: m.type == "error" and trouble.append(f"console: {m.text}"))
    tab.on("response", lambda r: r.status >= 400 and trouble.append(f"{r.status}: {r.url}"))
    tab.goto(f"{address}/{page}", wait_until="load")
    if tab.locator(".math").count():
        tab.wait_for_function("window.MathJax?.startup?.promise !== undefined")
        tab.evaluate("MathJax.startup.promise")
    tab.evaluate("document.fonts.ready")
    tab.wait_for_load_state("networkidle")
    return tab, trouble


# Formulas that are there, whose fonts came, and that MathJax understood.
UNSET_FORMULAS = """() => [...document.querySelectorAll('.math')]
  .filter(m => !m.querySelector('mjx-container') || m.querySelector('mjx-merror'))
  .map(m => m.textContent.trim())"""
MISSING_FONTS = """() => [...document.fonts].filter(f => f.status === 'error').map(f => f.family)"""
# Wider than the screen and in no box that scrolls.
TOO_WIDE = """() => [...document.querySelectorAll('main article *')].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let box = e; box && box.tagName !== 'ARTICLE'; box = box.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(box).overflowX)
        && box.getBoundingClientRect().right <= innerWidth + 1) return false;
  return true;
}).map(e => e.outerHTML.slice(0, 120))"""


@each_page
@pytest.mark.parametrize(("view", "theme"), [("desktop", "light"), ("phone", "dark")])
def test_page_is_whole_without_a_network(browser, address, page: str, view: str, theme: str):
    tab, trouble = show(browser, address, f"{page}.html", view, theme)
    try:
        assert trouble == []
        assert tab.evaluate(UNSET_FORMULAS) == []
        assert tab.evaluate(MISSING_FONTS) == []
        assert tab.evaluate("document.documentElement.dataset.theme") == theme
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert tab.evaluate(TOO_WIDE) == []
        assert tab.locator(".search-button-field:visible, .search-button:visible").count() == 1
    finally:
        tab.close()


def test_contents_of_a_page_open_on_a_phone(browser: Browser, address: str):
    tab, trouble = show(browser, address, f"{TOC['root']}.html", "phone", "light")
    try:
        tab.locator(".secondary-toggle:visible").first.click()
        assert tab.locator("#pst-secondary-sidebar-modal a:visible").count()
        assert trouble == []
    finally:
        tab.close()


@pytest.mark.parametrize("served", [True, False], ids=["served", "from disk"])
def test_search_finds_a_word(browser: Browser, address: str, site: Path, served: bool):
    start = address if served else site.as_uri()
    tab, trouble = show(browser, start, "search.html?q=prototype", "desktop", "light")
    try:
        tab.wait_for_selector("#search-results li a", timeout=10_000)
        assert tab.locator("#search-results li a[href*='glossary']").count()
        assert trouble == []
    finally:
        tab.close()


def test_a_hidden_solution_opens(browser: Browser, address: str, site: Path):
    pages = [p for p in PAGES if read(site / f"{p}.html").select("details, .toggle")]
    if not pages:
        pytest.skip("no page has a hidden solution yet")
    tab, trouble = show(browser, address, f"{pages[0]}.html", "phone", "light")
    try:
        if tab.locator("main details").count():
            tab.locator("main details summary").first.click()
            assert tab.locator("main details").first.get_attribute("open") is not None
        else:
            box = tab.locator("main .admonition.toggle").first
            box.locator(".admonition-title").click()
            assert "toggle-hidden" not in box.get_attribute("class")
        assert trouble == []
    finally:
        tab.close()


def test_a_slider_steps_through_its_figures(browser: Browser, address: str, site: Path):
    """Without a kernel: by the page's own script."""
    pages = [p for p in PAGES if read(site / f"{p}.html").select(".figure input[type=range]")]
    assert pages
    tab, trouble = show(browser, address, f"{pages[0]}.html", "desktop", "light")
    try:
        figure = tab.locator(".figure:has(input[type=range])").first
        knob, frames = figure.locator("input"), figure.locator(".frames > div")
        seen = [figure.locator(".frames > div:visible svg").get_attribute("aria-label")]
        knob.focus()
        for _ in range(frames.count() - 1):
            knob.press("ArrowRight")
            visible = figure.locator(".frames > div:visible svg")
            assert visible.count() == 1
            seen.append(visible.get_attribute("aria-label"))
            assert figure.locator("output").inner_text() in seen[-1]
        assert len(set(seen)) == frames.count() > 2
        assert trouble == []
    finally:
        tab.close()

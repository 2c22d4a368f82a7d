"""Turn a chapter's MyST into the Markdown that Colab, GitHub, VS Code and Jupyter show rightly.

What only the site understands becomes what all understand: roles become words with a link to the
site's page, formulas stand in dollars, admonitions are block quotes, hidden cells are collapsed.
MyST's own parser finds the pieces; all else of a text stays as it was written. What this file does
not know is refused, so that nothing raw gets into a notebook.
"""

from __future__ import annotations

import copy
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import yaml
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser
from nbformat import NotebookNode
from pybtex.database import Entry, Person, parse_file
from sphinx.util.nodes import _make_id

ROOT = Path(__file__).resolve().parents[1]
COLAB = "https://colab.research.google.com"
ADMONITIONS = {
    *("admonition", "attention", "caution", "danger", "dropdown", "error", "hint"),
    *("important", "note", "seealso", "tip", "warning"),
}
UNPORTABLE = {
    *("amsmath", "dl_open", "footnote_anchor", "footnote_ref", "footnote_reference_open"),
    "math_block_label",
    *("myst_block_break", "myst_line_comment", "span_open"),
    *("substitution_block", "substitution_inline"),
}
BIBLIOGRAPHY = "book/bibliography"
TITLE = re.compile(r"# @title (.+)\n")  # what Colab shows in place of a hidden cell's code


class UnknownMyst(ValueError):
    """A piece of MyST for which there is no portable form."""


@cache
def config() -> dict:
    """What _config.yml says."""
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


@cache
def parser() -> MarkdownIt:
    """The site's own parser, with its extensions: what is prose here is prose on the page."""
    extensions = config()["parse"]["myst_enable_extensions"]
    return create_md_parser(MdParserConfig(enable_extensions=extensions), RendererHTML)


@cache
def pages() -> dict[str, str]:
    """The text of each written page of the site by its name, in the order of the contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    names = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    files = {name: ROOT / "book" / f"{PurePosixPath(name).name}.md" for name in names}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()}


@cache
def titles() -> dict[str, str]:
    """The title of each page."""
    return {name: re.search(r"^# (.+)$", text, re.M)[1] for name, text in pages().items()}


@cache
def equations() -> dict[str, tuple[int, str]]:
    """The number of each labelled equation, counted through the book as the site does; its page."""
    labels = (
        (label, name)
        for name, text in pages().items()
        for token in parser().parse(text)
        if token.info.strip() == "{math}" and (label := options(token.content)[0].get("label"))
    )
    return {label: (number, name) for number, (label, name) in enumerate(labels, 1)}


@cache
def terms() -> dict[str, str]:
    """The anchor of each term in the glossary; terms are looked up without regard to case."""
    tokens = parser().parse(pages()["book/glossary"])
    (content,) = [token.content for token in tokens if token.info == "{glossary}"]
    heads = re.findall(r"^\S.*$", content, re.M)
    return {head.casefold(): _make_id(f"term-{head}") for head in heads}


@cache
def papers() -> dict[str, Entry]:
    """The entries of the bibliography."""
    return dict(parse_file(ROOT / "book" / "references.bib").entries)


def in_words(people: list[Person]) -> str:
    """One or two last names, or the first 'et al.'"""
    first, *others = [
        " ".join(map(str, [*person.rich_prelast_names, *person.rich_last_names]))
        for person in people
    ]
    if len(others) > 1:
        return f"{first} et al."
    return " and ".join([first, *others])


def address(page: str, anchor: str = "") -> str:
    """Where a page of the site is read."""
    return f"{config()['html']['baseurl']}{page}.html" + (f"#{quote(anchor)}" if anchor else "")


def on_colab(page: str) -> str:
    """Where Colab opens a chapter."""
    repository = config()["repository"]
    path = repository["url"].removeprefix("https://")
    return f"{COLAB}/{path.replace('.com', '', 1)}/blob/{repository['branch']}/{page}.ipynb"


def options(content: str) -> tuple[dict[str, str], str]:
    """The options with which a directive begins, and its body."""
    head = re.match(r"(?::[\w-]+:.*\n)*", content)[0]
    found = dict(re.findall(r"^:([\w-]+): *(.*)$", head, re.M))
    return found, content[len(head) :].strip("\n")


def markdown(text: str, page: str) -> str:
    """The portable form of MyST text that stands on `page`, 'notebooks/02_maml' for example.

    Raises:
        UnknownMyst: at what has no portable form, or at a name that is not there.
    """
    lines, pieces = text.split("\n"), defaultdict(list)
    for token in parser().parse(text):
        if token.map:
            pieces[tuple(token.map)].append(token)
    # From the end, so that the numbers of the lines before stay right.
    for (first, last), tokens in sorted(pieces.items(), reverse=True):
        old = "\n".join(lines[first:last])
        if (new := in_place_of(old, tokens, page)) != old:
            lines[first:last] = new.split("\n")
    return "\n".join(lines)


def in_place_of(source: str, tokens: list[Token], page: str) -> str:
    """The portable form of the lines that these tokens come from."""
    for token in tokens:
        if token.type in UNPORTABLE:
            raise UnknownMyst(f"{page}: no notebook shows {token.type} rightly: {source!r}")
        if token.type == "html_block":
            check_html(token.content, page)
        if token.type == "myst_target" and source.startswith("("):
            return ""
        if token.type in ("fence", "colon_fence") and token.info.strip().startswith("{"):
            margin = re.match(r"[^`:~]*", source)[0]
            return with_margin(directive(token, page), margin, re.sub(r"[^\s>]", " ", margin))
    inline = [child for token in tokens for child in token.children or []]
    new = "".join(spans(source, inline, page))
    if "$$" in new and "$$" not in source:
        raise UnknownMyst(f"{page}: two formulas touch, and would be read as one: {source!r}")
    return new


def with_margin(text: str, first: str, rest: str) -> str:
    """Text behind the marks of a list or quote; in a quote a formula stands on one line."""
    if ">" in rest:
        text = re.sub(r"\$\$.+?\$\$", lambda found: " ".join(found[0].split()), text, flags=re.S)
    lines = zip((first, *[rest] * text.count("\n")), text.split("\n"), strict=True)
    return "\n".join(margin + line if line.strip() else margin.rstrip() for margin, line in lines)


def check_html(html: str, page: str) -> None:
    """Refuse HTML that holds MyST, which no one reads there, or leads to a file beside the page."""
    if re.search(r"\{[\w:-]+\}`|(src|href)=[\"']?(?!https:|#|data:)", html):
        raise UnknownMyst(f"{page}: no notebook shows this rightly: {html!r}")


def spans(source: str, children: list[Token], page: str) -> Iterator[str]:
    """The source of some inline tokens, piece by piece, with words in place of roles."""
    for child in children:
        check_span(child, page)
        if child.type not in ("myst_role", "code_inline"):
            continue
        # The parser gives no places, so each piece is looked for after the one before. In a
        # block quote a line's mark may stand between two words.
        name = child.meta.get("name", "")
        mark = re.escape(f"{{{name}}}") if name else ""
        words = r"[\s>]+".join(map(re.escape, child.content.split())).replace(r"\|", r"\\?\|")
        found = re.search(rf"{mark}(`+)[\s>]*{words}[\s>]*\1", source)
        if found is None or (name and r"\|" in found[0]):
            raise UnknownMyst(f"{page}: write {child.content!r} otherwise, as \\lvert for a bar")
        yield source[: found.start()]
        yield role(name, child.content, page) if name else found[0]
        source = source[found.end() :]
    yield source


def check_span(child: Token, page: str) -> None:
    """Refuse what stands within a line and is shown on the site alone."""
    told = f"{page}: no notebook shows {child.content or child.attrs!r} rightly"
    if child.type in UNPORTABLE or child.attrs.keys() - {"href", "src", "alt", "title"}:
        raise UnknownMyst(f"{told} ({child.type})")
    if child.type == "text" and "$" in child.content:
        raise UnknownMyst(f"{told}: a dollar begins a formula, so name the currency in letters")
    if child.type == "math_inline" and child.content != child.content.strip():
        raise UnknownMyst(f"{told}: a formula begins and ends without a space")
    if child.type == "html_inline":
        check_html(child.content, page)
    if not str(child.attrs.get("href", child.attrs.get("src", "http"))).startswith("http"):
        raise UnknownMyst(f"{told}: it leads nowhere from a notebook")


def role(name: str, content: str, page: str) -> str:
    """The words, link or formula that a role stands for.

    Raises:
        UnknownMyst: if the role has no portable form, or what it names is not there.
    """
    shown, target = re.fullmatch(r"(.*?)(?:\s*<([^<>]*)>)?", content, re.S).groups()
    target = target or shown
    match name:
        case "math":
            return f"${content.strip()}$"
        case "term":
            anchor = look_up(terms(), target.casefold(), page)
            return f"[{shown}]({address('book/glossary', anchor)})"
        case "doc":
            there = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            title = look_up(titles(), there, page)
            return f"[{title if target == shown else shown}]({address(there)})"
        case "eq":
            number, there = look_up(equations(), target, page)
            if there == page:
                return f"({number})"
            return f"[({number})]({address(there, f'equation-{target}')})"
        case "cite" | "cite:t":
            return cited(content.split(","), name == "cite:t", page)
    raise UnknownMyst(f"{page}: the role {{{name}}} has no portable form")


def look_up(table: dict[str, Any], name: str, page: str) -> Any:
    """What a table of the book says of a name that a page uses."""
    if name not in table:
        raise UnknownMyst(f"{page}: {name!r} names what is not there")
    return table[name]


def cited(keys: list[str], textual: bool, page: str) -> str:
    """Papers as a text cites them, each with a link to the site's bibliography."""
    links = []
    found = {key.strip(): look_up(papers(), key.strip(), page) for key in keys}
    for key, entry in found.items():
        if "year" not in entry.fields or not entry.persons:
            raise UnknownMyst(f"{page}: {key!r} in references.bib has no year, or no author")
    whose = {k: in_words(e.persons.get("author") or e.persons["editor"]) for k, e in found.items()}
    for who, year, key in sorted((whose[k], e.fields["year"], k) for k, e in found.items()):
        shown = year if textual else f"{who}, {year}"
        link = f"[{shown}]({address(BIBLIOGRAPHY, f'cite-{key}')})"
        links.append(f"{who} [{link}]" if textual else link)
    return ", ".join(links) if textual else f"[{', '.join(links)}]"


def directive(token: Token, page: str) -> str:
    """The formula, block quote or fold that a directive stands for.

    Raises:
        UnknownMyst: if the directive has no portable form.
    """
    kind, argument = re.fullmatch(r"\{([\w:-]+)\}\s*(.*)", token.info.strip()).groups()
    chosen, body = options(token.content)
    if kind == "math":
        odd = chosen.keys() - {"label", "class"} or body.startswith("---") or "\n\n" in body
        if argument or odd:
            raise UnknownMyst(f"{page}: a formula is one paragraph, with no option but a label")
        if r"\\" in body and r"\begin{" not in body:
            body = f"\\begin{{split}}\n{body}\n\\end{{split}}"  # as Sphinx does
        if label := chosen.get("label"):
            body += f"\n\\tag{{{look_up(equations(), label, page)[0]}}}"
        return f"$$\n{body}\n$$"
    if kind not in ADMONITIONS:
        raise UnknownMyst(f"{page}: the directive {{{kind}}} has no portable form")
    heading = "See also" if kind == "seealso" else kind.capitalize()
    if argument and kind in ("admonition", "dropdown"):
        heading = argument
    elif argument:
        body = f"{argument}\n{body}"
    heading, body = markdown(heading, page), markdown(body, page)
    if "dropdown" not in (kind, *chosen.get("class", "").split()):
        return with_margin(f"**{heading}**\n\n{body}", "> ", "> ")
    if re.search(r"[`*_\[$<]", heading):
        raise UnknownMyst(f"{page}: the title of a fold is plain words, not {heading!r}")
    return f"<details><summary>{heading}</summary>\n\n{body}\n\n</details>"


def notebook(myst: NotebookNode, page: str) -> NotebookNode:
    """The portable form of a chapter's notebook; the code is the same, line for line."""
    portable = copy.deepcopy(myst)
    for cell in portable.cells:
        if cell.cell_type == "markdown":
            cell.source = markdown(cell.source, page)
        elif tags := {"hide-input", "hide-cell"} & set(cell.metadata.get("tags", [])):
            collapse(cell, with_outputs="hide-cell" in tags)
    title, _, rest = portable.cells[0].source.partition("\n")
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({on_colab(page)})"
    site = f"[This chapter in the book]({address(page)}), where it reads best"
    portable.cells[0].source = f"{title}\n\n{badge} &nbsp; {site}\n{rest}"
    return portable


def collapse(cell: NotebookNode, with_outputs: bool) -> None:
    """Fold a cell that the site hides: in JupyterLab and VS Code, and as a form on Colab.

    Raises:
        ValueError: if nothing says what is inside.
    """
    if not TITLE.match(cell.source):
        raise ValueError(f"A hidden cell begins with '# @title What is inside': {cell.source!r}")
    cell.metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}
    if with_outputs:
        cell.metadata |= {"collapsed": True}
        cell.metadata["jupyter"]["outputs_hidden"] = True

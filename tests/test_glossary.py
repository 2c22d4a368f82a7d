"""The glossary: in order, and every term of it that a chapter uses is a link at its first use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from markdown_it.token import Token

import notebooks
import portable

each_chapter = pytest.mark.parametrize("text", notebooks.chapters(), ids=lambda text: text.stem)

# Words that are mostly used in their everyday sense: they count only after a number, "5-way".
EVERYDAY = {"way", "key, query and value"}
NUMBER = r"(?:\d+|[kmn])[-\s]|(?:one|two|three|four|five|ten|twenty)-"
LINK = r"\{term\}`(?:[^`<]*<)?(?P<target>[^`>]+)>?`"

PARSER = portable.parser()


def entries() -> list[list[str]]:
    """The spellings of every entry, in the order of the glossary."""
    text = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
    (content,) = [t.content for t in PARSER.parse(text) if t.info == "{glossary}"]
    heads = re.findall(r"^(?:\S.*\n)+", content, re.MULTILINE)
    return [head.splitlines() for head in heads]


def written(inline: Token) -> str:
    """The prose of a paragraph or table cell, with its {term} links and a 0 for all else."""
    parts: list[str] = []
    inside = 0
    for token in inline.children or []:
        inside += (token.type == "link_open") - (token.type == "link_close")
        if token.type in ("softbreak", "hardbreak"):
            parts.append("\n")
        elif token.meta.get("name") == "term":
            parts.append(f"{{term}}`{token.content}`")
        elif inside or token.type in ("code_inline", "image", "math_inline", "myst_role"):
            parts.append("0")  # so that a formula before "-way" is a number
        elif token.type == "text":
            parts.append(token.content)
    return "".join(parts)


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Every paragraph and table cell, with the number of its first line; no heading, no code."""
    before = ""
    for token in PARSER.parse(text):
        if token.type == "inline" and before != "heading_open":
            yield token.map[0] + 1, written(token)
        before = token.type


def pattern(glossary: list[list[str]]) -> re.Pattern[str]:
    """What finds links and, among the terms that start at one place, the longest."""
    spellings = sorted((s for entry in glossary for s in entry), key=len, reverse=True)
    terms = "|".join(re.escape(spelling).replace(r"\ ", r"\s+") for spelling in spellings)
    word = rf"(?<![\w-])(?P<number>{NUMBER})?(?P<term>{terms})(?:e?s)?(?![\w+-])"
    return re.compile(f"{LINK}|{word}", re.IGNORECASE)


def unlinked(text: str, glossary: list[list[str]]) -> list[str]:
    """First uses of terms that are no links, each as 'line, term: the line'."""
    entry_of = {spelling.casefold(): entry[0] for entry in glossary for spelling in entry}
    find, seen, found = pattern(glossary), set(), []
    for start, paragraph in prose(text):
        for match in find.finditer(paragraph):
            spelling = " ".join((match["target"] or match["term"]).split()).casefold()
            entry = entry_of.get(spelling)
            everyday = entry in EVERYDAY and not match["number"] and not match["target"]
            if entry in seen or everyday:
                continue
            seen.add(entry)
            if match["term"]:
                line = start + paragraph[: match.start("term")].count("\n")
                found.append(f"{line}, {entry}: {text.splitlines()[line - 1].strip()}")
    return found


def targets(text: str) -> set[str]:
    """The terms that a chapter links to."""
    links = [link["target"] for _, part in prose(text) for link in re.finditer(LINK, part)]
    return {target.casefold() for target in links}


def test_entries_are_in_alphabetical_order():
    firsts = [entry[0].casefold() for entry in entries()]
    assert len(firsts) > 50
    assert firsts == sorted(firsts)


def test_no_term_is_explained_twice():
    spellings = [spelling.casefold() for entry in entries() for spelling in entry]
    assert [s for s in spellings if spellings.count(s) > 1] == []


@each_chapter
def test_links_name_terms(text: Path):
    known = {spelling.casefold() for entry in entries() for spelling in entry}
    assert targets(text.read_text(encoding="utf-8")) - known == set()


@each_chapter
def test_first_use_of_each_term_is_a_link(text: Path):
    found = unlinked(text.read_text(encoding="utf-8"), entries())
    assert not found, f"{text.name}, link as {{term}} at line\n" + "\n".join(found)


SMALL = [["few-shot"], ["query set"], ["set"], ["shot", "shots"], ["way", "ways"]]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("# T\n\nHere.\nA Query Set.", ["4, query set: A Query Set."]),
        ("Two query sets, then a set.", ["1, query set:", "1, set:"]),
        ("A {term}`query set` and a query set.", []),
        ("Two {term}`sets <query set>`, then a\nset.", ["2, set: set."]),
        ("The set, and {term}`set` too late.", ["1, set:"]),
        ("**{term}`Shots`**, a shot.", []),
        ("A one-shot or 5-shot test.", ["1, shot:"]),
        ("Few-shot, a setting, an off-shot, a set-up, a set_of, a set++.", ["1, few-shot:"]),
        ("One way, many ways, half-way.", []),
        ("Either way, 5 ways.", ["1, way:"]),
        ("An {math}`N`-way task.", ["1, way:"]),
        ("| a | b |\n|---|---|\n| x | set |", ["3, set: | x | set |"]),
        ("> A set.", ["1, set:"]),
        ("1. One.\n\n   A set.", ["3, set:"]),
        ("# A set\n\n`set`, $set$, {math}`set`, {cite}`set`, {doc}`a set <set>`", []),
        ("[a set](set.md), ![set](set.png), <b title='set'>b</b>, https://set.org", []),
        ("```{math}\nset\n```\n\n```{code-cell}\nset = 1\n```", []),
        ("$$\nset\n$$\n\n% set\n\n(set)=\n\n# Set\n\n## A set", []),
        ("---\nset: set\n---\n\n# T\n\n<details>\nset: nothing here can be a link\n</details>", []),
    ],
)
def test_the_check_finds_first_uses_that_are_no_links(text: str, lines: list[str]):
    found = unlinked(text, SMALL)
    assert len(found) == len(lines), found
    assert all(map(str.startswith, found, lines)), found


def test_the_check_reads_links_but_not_code():
    text = "A {term}`task`.\n\n- {term}`Several <Query set>`, not ``{term}`code` ``."
    assert targets(text) == {"task", "query set"}

"""MyST becomes Markdown that every viewer shows, or is refused; nothing else of a text changes."""

from __future__ import annotations

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import portable

PAGE = "notebooks/02_maml"
BASE = portable.config()["html"]["baseurl"]
GLOSSARY, BIBLIOGRAPHY = f"{BASE}book/glossary.html#term-", f"{BASE}book/bibliography.html#cite-"
CONCEPTS = f"[{portable.titles()['notebooks/01_concepts']}]({BASE}notebooks/01_concepts.html)"
NUMBER = portable.equations()["eq-maml-inner"][0]

SAME = [
    "plain *words*, a [link](https://example.org/a_b), `code` and $x_1$",
    "`{math}` alone, ``{term}`task` ``, and {braces}",
    "```python\nprint('{math}`x`')\n```",
    "| a | b |\n|---|--:|\n| `x|y` | 2 |",
    "> **Predict.** What comes?\n> This?",
    "<details><summary>Answer</summary>\nAt most 5 < 6.\n</details>",
    "$$\nx = 1\n$$",
    "trailing spaces  \nand lines\n\n\n- a\n  - b\n",
]
CHANGED = {
    "a {math}`\\alpha_{1}`-step": "a $\\alpha_{1}$-step",
    "{math}`a`, {math}` b `": "$a$, $b$",
    "**{term}`task`**": f"**[task]({GLOSSARY}task)**",
    "{term}`Tasks\n<task>` here": f"[Tasks]({GLOSSARY}task) here",
    "{term}`maml`": f"[maml]({GLOSSARY}MAML)",
    "{doc}`01_concepts`": CONCEPTS,
    "{doc}`signs <../book/notation>`": f"[signs]({BASE}book/notation.html)",
    "by {eq}`eq-maml-inner`": f"by ({NUMBER})",
    "{eq}`eq-notation-interval`": f"[({portable.equations()['eq-notation-interval'][0]})]"
    f"({BASE}book/notation.html#equation-eq-notation-interval)",
    "{cite:t}`finn2017maml` say": f"Finn et al. [[2017]({BIBLIOGRAPHY}finn2017maml)] say",
    "so {cite}`snell2017prototypical,lampert2014attribute`": "so "
    f"[[Lampert et al., 2014]({BIBLIOGRAPHY}lampert2014attribute), "
    f"[Snell et al., 2017]({BIBLIOGRAPHY}snell2017prototypical)]",
    "{cite:t}`thrun1998learning`": f"Thrun and Pratt [[1998]({BIBLIOGRAPHY}thrun1998learning)]",
    "`{math}` is {math}`x`, ``{math}`x` `` too": "`{math}` is $x$, ``{math}`x` `` too",
    "| {math}`a` | {term}`task` |\n|---|---|\n| {math}`b` | {math}`b` |": "| $a$ "
    f"| [task]({GLOSSARY}task) |\n|---|---|\n| $b$ | $b$ |",
    "> so {math}`a +\n> b`\n> it is": "> so $a + b$\n> it is",
    "(here)=\n## A heading": "\n## A heading",
    "one\n(here)=\ntwo": "one\n\ntwo",
    "a\n\n```{math}\n:label: eq-maml-inner\nx \\\\\ny\n```\n\nb": "a\n\n$$\n"
    f"\\begin{{split}}\nx \\\\\ny\n\\end{{split}}\n\\tag{{{NUMBER}}}\n$$\n\nb",
    "- ```{math}\n  x\n  ```\n- b": "- $$\n  x\n  $$\n- b",
    "> ```{math}\n> x\n> + y\n> ```\n> z": "> $$ x + y $$\n> z",
    "1. :::{note}\n   hi\n   :::": "1. > **Note**\n   >\n   > hi",
    "~~~{note}\nx  \ny\n~~~": "> **Note**\n>\n> x  \n> y",
    "| `x \\| y` | {math}`a` |\n|---|---|": "| `x \\| y` | $a$ |\n|---|---|",
    "- a\n\n  ```{math}\n  x\n  ```\n- b": "- a\n\n  $$\n  x\n  $$\n- b",
    "```{note}\nWith {math}`x`.\n\nMore.\n```": "> **Note**\n>\n> With $x$.\n>\n> More.",
    ":::{admonition} A {math}`y`\nBody\n:::": "> **A $y$**\n>\n> Body",
    ":::{tip} First.\nSecond.\n:::": "> **Tip**\n>\n> First.\n> Second.",
    ":::{note}\n```{math}\nx\n```\n:::": "> **Note**\n>\n> $$ x $$",
    "```{admonition} Answer\n:class: tip dropdown\n{math}`x`\n```": "<details>"
    "<summary>Answer</summary>\n\n$x$\n\n</details>",
}
REFUSED = {
    "{ref}`there`": r"role \{ref\} has no portable form",
    "{term}`no such word`": "'no such word' names what is not there",
    "{cite}`nobody2001`": "names what is not there",
    "{eq}`eq-none`": "names what is not there",
    "{doc}`99_none`": "names what is not there",
    "```{figure} a.png\n```": r"directive \{figure\} has no portable form",
    "```{math}\n:label: eq-nowhere\nx\n```": "names what is not there",
    "[there](01_concepts.md)": "leads nowhere from a notebook",
    "a note[^1]\n\n[^1]: of this": "footnote",
    "US$ 5 and US$ 6": "without a space",
    "US$5": "name the currency in letters",
    "{math}`a`{math}`b`": "two formulas touch",
    "| {math}`\\|x\\|` |\n|---|": "lvert for a bar",
    "```{math} x\n```": "a formula is one paragraph",
    "```{math}\nx\n\ny\n```": "a formula is one paragraph",
    "```{math}\n:name: a\nx\n```": "no option but a label",
    ":::{dropdown} Why `x`?\ny\n:::": "title of a fold is plain words",
    "![a](../book/_static/x.png)": "leads nowhere from a notebook",
    "<img src='../x.png'>": "no notebook shows this rightly",
    "<details>\n{term}`task`\n</details>": "no notebook shows this rightly",
    "`x`{.cls}": "no notebook shows",
    "``` {figure} x\n```": r"directive \{figure\} has no portable form",
    "% a comment": "myst_line_comment",
    "$$\nx\n$$ (eq-a)": "math_block_label",
}


@pytest.mark.parametrize("text", SAME)
def test_what_every_viewer_understands_stays_as_it_is(text: str):
    assert portable.markdown(text, PAGE) == text


@pytest.mark.parametrize(("text", "expected"), CHANGED.items(), ids=range(len(CHANGED)))
def test_what_only_the_site_understands_changes(text: str, expected: str):
    assert portable.markdown(text, PAGE) == expected
    assert portable.markdown(expected, PAGE) == expected


@pytest.mark.parametrize(("text", "told"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_has_no_portable_form_is_refused(text: str, told: str):
    with pytest.raises(portable.UnknownMyst, match=told):
        portable.markdown(f"Before.\n\n{text}\n", PAGE)


def test_a_notebook_begins_with_its_title_colab_and_its_page():
    myst = new_notebook(cells=[new_markdown_cell("# Title\n\nWords."), new_code_cell("1 + 1")])
    title, badge, words = portable.notebook(myst, PAGE).cells[0].source.split("\n\n")
    assert (title, words) == ("# Title", "Words.")
    assert f"({portable.COLAB}/github/" in badge and f"/{PAGE}.ipynb)" in badge
    assert f"({BASE}{PAGE}.html)" in badge
    assert myst.cells[0].source == "# Title\n\nWords.", "the original stays as it is"


def test_a_hidden_cell_is_folded_everywhere():
    cells = [
        new_markdown_cell("# T"),
        new_code_cell("# @title Figure: a line\nx", metadata={"tags": ["hide-input", "a"]}),
        new_code_cell("# @title The solution\nx", metadata={"tags": ["hide-cell"]}),
        new_code_cell("x", metadata={"tags": ["parameters"]}),
    ]
    _, figure, solution, plain = portable.notebook(new_notebook(cells=cells), PAGE).cells
    assert figure.metadata == {
        "tags": ["hide-input", "a"],
        "cellView": "form",
        "jupyter": {"source_hidden": True},
    }
    assert solution.metadata["collapsed"]
    assert solution.metadata["jupyter"] == {"source_hidden": True, "outputs_hidden": True}
    assert plain.metadata == {"tags": ["parameters"]}
    assert [c.source for c in (figure, solution, plain)] == [c.source for c in cells[1:]]


def test_a_hidden_cell_says_what_is_inside():
    cell = new_code_cell("x = 1", metadata={"tags": ["hide-input"]})
    with pytest.raises(ValueError, match=r"begins with '# @title What is inside': 'x = 1'"):
        portable.notebook(new_notebook(cells=[new_markdown_cell("# T"), cell]), PAGE)


def test_equations_are_counted_through_the_book():
    numbers = [number for number, _ in portable.equations().values()]
    assert numbers == list(range(1, len(numbers) + 1))
    written = sum(len(re.findall(r"^ *:label:", t, re.M)) for t in portable.pages().values())
    assert len(numbers) == written

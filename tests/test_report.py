"""The report is one file that shows what it must, loads nothing, and lets no name do harm."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import paint, told_in_one_line
from PIL import Image

from metautils import classifier, report
from metautils.evaluate import wilson95

ROW = {"train_loss": 0.5, "train_accuracy": 80, "validation_loss": 0.7, "validation_accuracy": 75}
RECORD = {
    "command": "python -m metautils finetune --data '<b>' --out x",
    "images": {"train": 18, "validation": 6, "test": 6},
    "split": {"seed": 7, "groups": r"(\d+)<", "notes": ["a & b look nearly alike."]},
    "recipe": {"size": 32, "lr": 0.001},
    "stage_one": {"strength": 10.0, "accuracy": 97.5, "seconds": 1},
    "stage_two": [ROW | {"number": k, "seconds": 1} for k in (1, 2, 3)],
    "minutes": 1.5,
    "device": "a processor",
    "threads": 2,
    "torch": "9.9",
    "commit": "abcdef",
}
CHANCES = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.97, 0.03], [0.3, 0.7], [0.55, 0.45]]


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """Six images of two classes, of which the last four are wrong."""
    root = paint(tmp_path_factory.mktemp("data") / "my <photos>", 6, ["ant", "bee"])
    labels = torch.tensor([0, 1, 1, 1, 0, 1])
    files = [str(root / ("ant", "bee")[y] / f"{k}.png") for k, y in enumerate(labels.tolist())]
    return classifier.Tested(torch.tensor(CHANCES), labels, tuple(files), ("ant", "bee"))


@pytest.fixture(scope="module")
def record(tested):
    return RECORD | {"data": str(Path(tested.files[0]).parents[1])}


@pytest.fixture(scope="module")
def soup(tested, record):
    return parsed(report.page(tested, record))


def parsed(text):
    """The page to be asked, where there is what the book's tests need."""
    return pytest.importorskip("bs4").BeautifulSoup(text, "html.parser")


def section(soup, heading):
    """The text from a heading to the next."""
    head = next(each for each in soup.find_all("h2") if heading in each.text)
    found = []
    for each in head.find_next_siblings():
        if each.name == "h2":
            break
        found.append(each)
    return found


def test_accuracy_stands_beside_what_it_must_be_compared_with(soup, tested):
    text = soup.main.get_text(" ")
    low, high = wilson95(2, 6)
    assert soup.find(class_="big").text == "33.3 %"
    assert re.search(rf"6 test images .* interval {low:.1f} to\s+{high:.1f} %", text, re.S)
    assert "66.7 % would be right if every answer were bee" in text
    assert f"mean over classes: {tested.balanced:.1f} %" in text
    assert "does not show that the classifier is better than always to answer bee" in text


def test_doubt_is_left_out_where_there_is_none(tested):
    labels = torch.tensor([0, 1] * 30)
    sure = replace(tested, chances=torch.eye(2)[labels], labels=labels, files=tested.files[:2] * 30)
    text = report.page(sure, {})
    assert "does not show" not in text
    assert "None of the test images was classified wrongly" in text
    assert "No image was taken for another" in text


def test_classes_have_their_recall_and_interval(soup):
    rows = [row.get_text("|") for row in soup.table.find_all("tr")][1:]
    assert rows == [
        "bee|1 of 4|25.0 %|{:.0f} to {:.0f} %|ant".format(*wilson95(1, 4)),
        "ant|1 of 2|50.0 %|{:.0f} to {:.0f} %|bee".format(*wilson95(1, 2)),
    ]


def test_confusion_is_a_picture_with_words(soup):
    drawing = section(soup, "What was taken")[0].svg
    told = {each.text for each in drawing.find_all("title")}
    assert told == {
        "ant taken for ant: 1",
        "ant taken for bee: 1",
        "bee taken for ant: 3",
        "bee taken for bee: 1",
    }
    assert "Most often taken: bee for ant (3), ant for bee (1)." in drawing["aria-label"]


def test_reliability_has_points_intervals_and_counts(soup):
    drawing = section(soup, "how sure")[1].svg
    assert "says 60 %: 0 of 1 right" in drawing["aria-label"]
    assert "says 94 %: 1 of 2 right" in drawing["aria-label"]
    assert len(drawing.find_all("circle")) == 5 == len(drawing.find_all("rect"))
    counts = [each.text for each in drawing.find_all("text")][-7:-2]
    assert counts == ["1", "1", "1", "1", "2"]


def test_errors_are_those_it_was_surest_of(soup, tested):
    figures = section(soup, "surest")[1].find_all("figure")
    said = [re.search(r"it said (\w+), ([\d.]+)", each.text).groups() for each in figures]
    assert said == [("ant", "97.0"), ("bee", "70.0"), ("ant", "60.0"), ("ant", "55.0")]
    assert [each.code.text for each in figures][:2] == ["bee/3.png", "ant/4.png"]
    for each in figures:
        kind, content = each.img["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (24, 20)
        assert each.img["alt"] == each.code.text


def test_large_images_become_small_ones(tmp_path, tested):
    Image.new("RGB", (1600, 800), "red").save(tmp_path / "x.png")
    content = report._thumbnail(tmp_path / "x.png").split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (160, 80)


def test_learning_curves_of_the_stage_that_has_epochs(soup, tested, record):
    curves = section(soup, "Learning curves")
    assert [each.text for each in curves if each.name == "h3"] == ["Stage two: all layers"]
    (drawn,) = [each for each in curves if each.name == "div"]
    assert [len(x["points"].split()) for x in drawn.find_all("polyline")] == [3] * 4
    once = report.page(tested, record | {"stage_two": record["stage_two"][:1]})
    (drawn,) = parsed(once).select(".charts")
    assert len(drawn.find_all("circle")) == 4  # a single epoch is a dot
    probe_only = report.page(tested, {k: x for k, x in record.items() if k != "stage_two"})
    assert "Learning curves" not in probe_only
    assert "97.5 % right in cross-validation, C = 10" in probe_only


def test_command_and_versions(soup):
    text = " ".join(each.get_text(" ") for each in section(soup, "How it was made"))
    for told in (
        "finetune --data '<b>' --out x",
        "18 train, 6 validation, 6 test",
        r"seed 7, groups (\d+)<",
        "size 32, lr 0.001",
        "a processor, 2 thread(s)",
        "metautils abcdef, torch 9.9",
    ):
        assert told in text
    assert "a & b look nearly alike." in section(soup, "About the images")[0].text


def test_names_do_no_harm(tested, record):
    bad = '"><script>alert(1)</script>&'
    named = replace(tested, classes=(bad, "bee"))
    text = report.page(named, record | {"data": f"/x/{bad[2:]}", "command": bad})
    assert "<script" not in text.replace("&lt;script", "")
    found = parsed(text)
    assert found.find("script") is None
    assert found.table.find("th", string=bad) is not None


def test_page_loads_nothing(soup):
    assert "default-src 'none'" in soup.find("meta", attrs={"http-equiv": True})["content"]
    assert not soup.find_all(["script", "link", "iframe"])
    links = {each[name] for name in ("src", "href") for each in soup.find_all(attrs={name: True})}
    assert all(link.startswith("data:") for link in links)


@pytest.mark.parametrize("classes", [1 + report.LABELLED, report.LABELLED])
def test_many_classes_stay_legible(tested, classes):
    labels = torch.arange(classes)
    many = classifier.Tested(
        torch.eye(classes).roll(1, 0),
        labels,
        (tested.files[0],) * classes,
        tuple("abcdef"[k % 6] * 30 + str(k) for k in range(classes)),
    )
    drawing = section(parsed(report.page(many, {})), "What was taken")[0].svg
    assert len(drawing.find_all("title")) == classes
    assert bool(drawing.find_all("text")) == (classes <= report.LABELLED)


@pytest.mark.parametrize(
    ("low", "high", "least", "expected"),
    [
        (0, 100, 0, [0, 20, 40, 60, 80, 100]),
        (1, 3, 1, [1, 2, 3]),
        (1, 15, 1, [5, 10, 15]),
        (0, 0.07, 0, [0, 0.02, 0.04, 0.06]),
        (0, 2.31, 0, [0, 0.5, 1, 1.5, 2]),
    ],
)
def test_ticks_are_round(low, high, least, expected):
    assert report._ticks(low, high, least) == expected


def test_report_is_written_whole_or_a_sentence_tells_why(tmp_path, tested, record):
    report.write(tested, record, tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert text == report.page(tested, record)
    (tmp_path / "file").write_text("")
    told_in_one_line(
        lambda: report.write(tested, record, tmp_path / "file" / "report.html"),
        "report.html could not be written",
    )


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_in_a_browser(tmp_path, tested, record, browser, width, scheme):
    """On a phone too; without a message on its console, and with legible contrast."""
    report.write(tested, record, tmp_path / "report.html")
    told = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("console", lambda message: told.append(message.text))
    page.on("request", lambda request: told.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    ink, paper = page.evaluate(
        "(style => [style.color, style.backgroundColor])(getComputedStyle(document.body))"
    )
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert abs(bright[0] - bright[1]) > 500 and (bright[0] > bright[1]) == (scheme == "dark")
    assert [each for each in told if not each.startswith(("data:", "file:"))] == []
    page.close()

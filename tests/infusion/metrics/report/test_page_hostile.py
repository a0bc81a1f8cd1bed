"""Labels, nouns, prompts, file and folder names are others' words: a page shows them, and is not made of them."""

import copy
import importlib.util
from html.parser import HTMLParser
from pathlib import Path

import pytest

from infusion.metrics.report.charts import plots
from infusion.metrics.report.page import page
from infusion.metrics.report.table import Measured

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "--><script>alert(1)</script><!--",
    "]]><svg onload=alert(1)>",
    "</style><script>alert(1)</script>",
    "</svg><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "${7*7} $x_{$ $\\frac{$ 5$",
    "&lt;b&gt; &amp;",
    "<metadata>",
    'a > b " viewBox="0',
    "#23262c",
]
DRAWN = ("small", "br", "path", "g", "use", "text", "tspan")  # as many as there are words and points


def made() -> dict:
    spec = importlib.util.spec_from_file_location("usual", Path(__file__).with_name("test_page.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.result()


class Parts(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.attributes, self.said = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.said.append(data)


@pytest.mark.parametrize("word", HOSTILE)
def test_words_of_others_stay_words(word):
    usual, hostile = made(), copy.deepcopy(made())
    said = {"label": word, "superclass": word, "noun": word, "file": word, "sha256": word, "group": word}
    said |= {"world_concept": word, "photos": word, "method": word}
    hostile |= said
    for card in hostile["pictures"]["best"] + hostile["pictures"]["worst"]:
        card["prompt"] = word
    more = usual | {"label": "other", "group": "other"}
    pages = []
    for result, name in ((usual, "plain"), (hostile, word)):
        protocol = {"concept": [f"a {name} {{}}"], "kin": [[name]], "nouns": [name]}
        settings = {"samples": 4, "metrics": [name], "sampler": name, "protocols": {name: protocol}}
        measured = Measured((result, more), settings, {"base": name}, f"python {name}")
        pages.append(Parts(page(measured, plots(measured.groups))))
    plain, attacked = pages
    ours, theirs = ([tag for tag in parts.elements if tag not in DRAWN] for parts in (plain, attacked))
    assert ours == theirs
    assert set(attacked.elements) <= set(plain.elements)
    assert {name for _, name, _ in attacked.attributes} == {name for _, name, _ in plain.attributes}
    for _, name, value in attacked.attributes:
        assert not name.startswith("on")
        if name == "href":
            assert value.startswith("#")
        if name == "src":
            assert value.startswith("data:image/")
        if name == "style":
            assert word not in value
    assert word in "".join(attacked.said)

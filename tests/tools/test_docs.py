"""Every Python snippet of the README and of docs/ runs, and prints what the page says it prints."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = (
    "README.md",
    "compile-and-cuda-graphs.md",
    "diffusers.md",
    "layers.md",
    "sliding-tile.md",
)  # they compile, or run pipelines
# A page's snippets run in order in one namespace. A comment `<!-- before` holds what a reader's program has already.
SNIPPET = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\n+^```text\n(?P<output>.*?)^```$)?|^<!-- before\n(?P<before>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


def run_page(text: str, name: str) -> int:
    """Run the snippets of a page; returns how many there were."""
    namespace: dict[str, object] = {"__name__": name}
    count = 0
    for snippet in SNIPPET.finditer(text):
        code = snippet["code"] if snippet["before"] is None else snippet["before"]
        first_line = text[: snippet.start()].count("\n") + 2
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Blank lines in front so that a traceback shows the page's own line numbers.
            exec(compile("\n" * (first_line - 1) + code, name, "exec"), namespace)
        if snippet["output"] is not None:
            assert printed.getvalue() == snippet["output"], f"{name}, line {first_line}: printed something else"
        count += snippet["before"] is None
    return count


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else []) for page in PAGES],
)
def test_snippets_run(page: Path) -> None:
    torch._dynamo.reset()
    text = page.read_text()
    assert run_page(text, str(page)) == len(re.findall(r"^```py", text, re.MULTILINE))


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pictures_are_what_their_script_draws() -> None:
    images = ROOT / "docs" / "images"
    pictures = runpy.run_path(str(images / "maps.py"))["PICTURES"]
    assert {name: (images / name).read_text() for name in pictures} == {name: draw() for name, draw in pictures.items()}


def test_the_harness_notices() -> None:
    assert run_page("```python\nx = 1\n```\n\n```text\n```\n", "page") == 1
    with pytest.raises(AssertionError, match="page, line 2: printed something else"):
        run_page("```python\nprint(1)\n```\n\n```text\n2\n```\n", "page")
    with pytest.raises(NameError):
        run_page("```python\nmissing()\n```\n", "page")
    assert run_page("<!-- before\ny = 2\n-->\n\n```python\nassert y == 2\n```\n", "page") == 1

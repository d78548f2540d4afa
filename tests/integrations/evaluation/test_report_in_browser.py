"""The page in a real browser. Needs playwright and a Chromium: ``nox -s browser``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import comparisons
from tokenreduce_integrations.evaluation.examples import find_examples
from tokenreduce_integrations.evaluation.report import write_report

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
#: Least contrast of text, by WCAG 2 AA.
CONTRAST = 4.5

#: Text whose contrast with what lies behind it is too low, and elements that stick out of the page.
INSPECT = """(least) => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const faint = [], wide = [];
  for (const element of document.querySelectorAll("main *")) {
    if (!element.checkVisibility()) continue;
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (own) {
      const style = getComputedStyle(element);
      const color = element.closest("svg") ? style.fill : style.color;
      const [a, b] = [light(parse(color)), light(behind(element))].sort((x, y) => y - x);
      if ((a + 0.05) / (b + 0.05) < least) faint.push(element.outerHTML.slice(0, 80));
    }
    const inside = element.closest(".scroll, pre, svg");
    const right = element.getBoundingClientRect().right;
    if ((!inside || inside === element) && right > innerWidth + 1) {
      wide.push(element.outerHTML.slice(0, 80));
    }
  }
  return { faint, wide, scrolls: document.documentElement.scrollWidth > innerWidth };
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    comparison = comparisons.testbed()
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(comparison, path, find_examples(comparison, each=2, most_runs=3))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the path, or named by CHROMIUM")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_in_a_browser(browser: Any, report: Path, size: str, scheme: Any) -> None:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    found = page.evaluate(INSPECT, CONTRAST)
    assert found == {"faint": [], "wide": [], "scrolls": False}

    document = json.loads((comparisons.testbed().folder / "comparison.json").read_text())
    heading = page.locator("#runs thead th[data-field=accuracy]")
    for order, reverse in (("ascending", False), ("descending", True)):
        heading.locator("button").focus()
        page.keyboard.press("Enter")
        assert heading.get_attribute("aria-sort") == order
        shown = page.locator("#runs tbody td[data-field=accuracy]").all_inner_texts()
        expected = [run["accuracy"]["value"] for run in document["runs"]]
        values = [f"{100 * value:.1f}" for value in sorted(expected, reverse=reverse)]
        assert [text.split()[0] for text in shown] == values

    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.reload()
        page.screenshot(path=Path(folder) / f"report_{size}_{scheme}.png", full_page=True)
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()

"""The report's page in a real browser: ``make test-browser``, not part of ``make test``. Leaves screenshots."""

import itertools
import os
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from playwright.sync_api import sync_playwright
from synthetic_runs import write_run

from results import VARIANTS

BROWSER = os.environ.get("CHROMIUM") or "chromium"
WIDTHS = {"desktop": (1280, 1000), "phone": (390, 844)}
SCREENSHOTS = ROOT / "output" / "screenshots"
DATASETS, MODELS = ("Clinc150", "Banking77", "ArgKP21"), ("org/Embedding-0.6B", "org/Embedding-8B")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    base = tmp_path_factory.mktemp("browser")
    usage = {"teacher": {"calls": 400, "input_tokens": 60000, "output_tokens": 800, "cached_answers": 0, "cost": 0.5}}
    for dataset, model, lr in itertools.product(DATASETS, MODELS, (1e-4, 1e-3)):
        name = f"{dataset}_{model[4:]}_{lr}"
        write_run(base / "output" / name, dataset=dataset, model=model, lr=lr, variants=tuple(VARIANTS), usage=usage,
                  gain=0.02 + 50 * lr, raw=True, tensors=lr > 1e-4)  # fmt: skip
    write_run(base / "output" / "halfway", lr=0.1, status="running")
    run_script("report.py", cwd=base)
    return base / "output" / "report" / "index.html"


@pytest.fixture(scope="module")
def browser():
    if not Path(BROWSER).exists():
        pytest.fail("no browser found: install chromium (Debian: apt-get install chromium), or give CHROMIUM=path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def opened(request, browser, page_file):
    """The page at one width: (page, what it complained of, what it asked for)."""
    width, height = WIDTHS[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: requests.append(asked.url))
    page.goto(page_file.as_uri())
    yield request.param, page, complaints, requests
    page.close()


def cells(page, column):
    return page.locator(f"#table tbody tr td:nth-child({column})").all_inner_texts()


def test_it_opens_without_errors_and_asks_for_nothing_else(opened, page_file):
    name, page, complaints, requests = opened
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert complaints == []
    loaded = page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert loaded and page.locator("img").count() >= 10
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    print(f"\nscreenshot: {SCREENSHOTS / name}.png")


def test_it_is_no_wider_than_the_window(opened):
    _, page, _, _ = opened
    for details in page.locator("details").all()[:25]:
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_every_link_leads_somewhere(opened):
    _, page, _, _ = opened
    targets = page.locator("nav a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert len(targets) == 7
    assert all(page.locator(target).count() == 1 for target in targets)


def test_a_heading_sorts_and_sorts_back(opened):
    _, page, complaints, _ = opened
    headings = page.locator("#table thead th").all_inner_texts()
    change = next(i for i, text in enumerate(headings, 1) if "change" in text)
    before = cells(page, change)
    button = page.locator(f"#table thead th:nth-child({change}) button")
    button.click()
    values = [float(text) for text in cells(page, change) if text]
    assert values == sorted(values) and len(values) == len([text for text in before if text])
    assert cells(page, change)[-1] == ""  # rows without a change stay at the end
    button.click()
    assert [float(text) for text in cells(page, change) if text] == values[::-1]
    assert page.locator(f"#table thead th:nth-child({change})").get_attribute("aria-sort") == "descending"
    button.press("Enter")  # by keyboard, too
    assert [float(text) for text in cells(page, change) if text] == values
    page.locator("#table thead th:nth-child(1) button").click()
    assert cells(page, 1) == sorted(cells(page, 1), key=str.lower)
    assert complaints == []


def test_a_query_opens_with_its_documents(opened):
    _, page, _, _ = opened
    first = page.locator("#details details").first
    assert not first.locator("table").is_visible()
    first.locator("summary").click()
    assert first.locator("table").is_visible()
    assert first.locator("tbody tr").count() == 20

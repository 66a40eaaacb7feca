"""The page in a real browser: Chromium without a window, over a fake gateway."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations

import pytest

from tests.gateway.conftest import MODEL
from tests.gateway.fake_upstream import TEXT, FakeUpstream, pieces

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
ATTACK = '<img src=x onerror="window.hacked = true">'
NODES = [
    {"id": 1, "parent": None, "num_tokens": 500, "locks": 1, "age": 0, "hits": 9},
    {"id": 2, "parent": 1, "num_tokens": 40, "locks": 0, "age": 70, "hits": 1},
    {"id": 3, "parent": 1, "num_tokens": 60, "locks": 0, "age": 5000, "hits": 0},
]
TREE = {"engines": [{"pid": 7, "num_nodes": 9, "num_tokens": 600, "locked_tokens": 500, "nodes": NODES}]}
NOTE_SHIFTS = """() => {
    window.shifted = [];
    const inAnswer = (node) => node?.parentElement?.closest("#answer"); // a growing word may go to the next line
    new PerformanceObserver((list) => {
        for (const { sources } of list.getEntries())
            for (const { node } of sources) if (!inAnswer(node)) window.shifted.push(node?.id || String(node));
    }).observe({ type: "layout-shift" });
}"""


@pytest.fixture(scope="module")
def chromium():
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream(tree=TREE).running() as running:
        yield running


@pytest.fixture
def page(chromium, upstream):
    with opened(chromium, upstream.url) as page:
        yield page


@contextmanager
def opened(chromium, url: str):
    """The page at a desk, which may say nothing on the console."""
    page = chromium.new_page(viewport=DESK)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{url}/dashboard/")
    playwright.expect(page.locator("#model option")).to_have_count(1)
    yield page
    page.close()
    assert complaints == []


def run(page, **fields) -> None:
    """Fill the form, ask, and wait for the end of the answer."""
    if fields:
        page.eval_on_selector("details", "element => { element.open = true; }")
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#run")
    playwright.expect(page.locator("#compare")).to_be_enabled()


def step_shown(page) -> int:
    return int(re.match(r"Step (\d+) of", page.text_content("#step-number"))[1])


def test_an_answer_is_shown_token_by_token(page, upstream):
    page.evaluate(NOTE_SHIFTS)
    upstream.delay_s = 0.01
    run(page)
    assert page.text_content("#answer") == TEXT
    tokens = page.locator("#answer .token")
    assert tokens.all_text_contents() == pieces(TEXT)
    kinds = [page.locator(f"#answer .{kind}").count() for kind in ("draft", "own", "prefill")]
    assert kinds == [int(page.text_content(f"#count-{kind}")) for kind in ("draft", "own", "prefill")]
    assert kinds[2] == 1 and sum(kinds) == len(pieces(TEXT)) == int(page.text_content("#total-tokens"))
    assert page.locator("#strip > g").count() == step_shown(page) == int(page.text_content("#total-steps"))
    assert page.evaluate("window.shifted") == []


def test_what_is_asked_for(page, upstream):
    run(page, prompt="Hi", temperature="0.5", max_tokens="9", seed="3", speculative_num_draft_tokens="6")
    page.uncheck("#speculative")
    page.click("text=raw text")
    run(page)
    first, second = upstream.requests
    assert first == {
        "model": "llm",
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0.5,
        "max_tokens": 9,
        "seed": 3,
        "speculative_num_draft_tokens": 6,
        "stream": True,
        "return_spec_trace": True,
    }
    assert second["prompt"] == "Hi" and second["speculative"] is False and "speculative_num_draft_tokens" not in second


def test_steps_by_keyboard(page):
    run(page)
    last = step_shown(page)
    page.focus("#step")
    page.keyboard.press("Home")
    assert step_shown(page) == 1 and page.is_disabled("#previous")
    assert page.locator("#answer .chosen").all_text_contents() == pieces(TEXT)[:1]
    page.keyboard.press("ArrowRight")
    assert step_shown(page) == 2
    page.focus("#answer")  # the arrow keys work everywhere
    page.keyboard.press("ArrowRight")
    assert step_shown(page) == 3
    page.keyboard.press("ArrowLeft")
    assert step_shown(page) == 2
    page.focus("#prompt")  # but where they move the cursor
    page.keyboard.press("ArrowRight")
    assert step_shown(page) == 2
    page.focus("#step")
    page.keyboard.press("End")
    assert step_shown(page) == last


def test_a_tree_says_what_became_of_its_nodes(page, upstream):
    run(page, speculative_num_draft_tokens=16)
    page.focus("#step")
    page.keyboard.press("Home")
    seen = set()
    for _ in range(int(page.text_content("#total-steps")) - 1):
        page.keyboard.press("ArrowRight")
        accepted = page.locator("#tree .node.accepted text").all_text_contents()
        own = page.locator("#tree .node.own text").all_text_contents()
        visible = [re.sub(" ", "␣", re.sub("\n", "⏎", text)) for text in page.locator(".chosen").all_text_contents()]
        assert accepted + own == visible
        seen.add(len(accepted))
    assert len(seen) > 2
    page.locator("#tree .node.rejected").first.focus()
    assert re.search(r"drafted with [\d.]+ %, the target gives it [\d.]+ %: rejected", page.text_content("#detail"))
    page.keyboard.press("ArrowUp")
    assert "rejected" not in page.evaluate("document.activeElement.getAttribute('class')")


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_labels_of_large_trees_can_be_read(page, viewport):
    page.set_viewport_size(viewport)
    run(page, speculative_num_draft_tokens=32)
    page.focus("#step")
    for _ in range(3):
        boxes = page.eval_on_selector_all(
            "#tree .box", "all => all.map((each) => each.getBoundingClientRect().toJSON())"
        )
        labels = page.locator("#tree .node text:not(.beside)").all_text_contents()
        assert len(boxes) == len(labels) >= 32
        assert not any(overlap(one, other) for one, other in combinations(boxes, 2))
        assert all(len(label) >= 5 for label in labels if label.endswith("…"))
        page.keyboard.press("ArrowLeft")


def overlap(one: dict, other: dict) -> bool:
    return (
        one["left"] < other["right"]
        and other["left"] < one["right"]
        and one["top"] < other["bottom"]
        and other["top"] < one["bottom"]
    )


def test_text_is_text(page, upstream):
    upstream.texts = [" A", ATTACK, "<script>window.hacked = true</script>", " z", ATTACK]
    run(page, prompt=ATTACK)
    assert page.text_content("#answer") == "".join(upstream.texts)
    page.focus("#step")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
        assert page.locator("#tree .node text").count() or page.locator("#tree svg").count() == 0
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("window.hacked") is None


def test_comparing(page, upstream):
    run(page)
    page.click("#compare")
    playwright.expect(page.locator("#comparison")).to_contain_text("The texts are equal.")
    first, second = upstream.requests
    assert second == {**first, "speculative": False}
    assert page.text_content("#answer") == TEXT  # the first answer stays
    upstream.texts = pieces(TEXT.replace("apples", "pears", 1))
    page.click("#compare")
    playwright.expect(page.locator("#comparison")).to_contain_text(f"part at character {TEXT.index('apples') + 1}")


def test_comparing_one_token(page, upstream):
    """There is no time between the first and the last."""
    upstream.texts = upstream.texts[:1]
    run(page)
    page.click("#compare")
    playwright.expect(page.locator("#comparison")).to_contain_text("The texts are equal.")
    assert not re.search("NaN|Infinity", page.inner_html("#comparison"))


def test_stopping(page, upstream):
    upstream.delay_s = 0.05
    page.click("#run")
    playwright.expect(page.locator("#answer .token").nth(3)).to_be_visible()
    page.click("#stop")
    playwright.expect(page.locator("#run")).to_be_enabled()
    shown = page.text_content("#answer")
    assert TEXT.startswith(shown) and shown != TEXT and page.is_hidden("#trouble")
    upstream.delay_s = 0.0
    run(page)  # and asking again works
    assert page.text_content("#answer") == TEXT
    assert (len(upstream.requests), upstream.num_answered) == (2, 1)


def test_tokens_that_are_parts_of_characters(page):
    """And an end token, which has no text."""
    script = """async ([tokens, texts]) => {
        const { Aligner } = await import("./tokens.js");
        const aligner = new Aligner();
        const pieces = tokens.flatMap((text, index) => aligner.push([{ text }], texts[index]));
        return [...pieces, ...aligner.finish()].map(({ token, text }) => [token.text, text]);
    }"""
    tokens = ["A", "\ufffd", "\ufffd", " b", "\ufffd", "\ufffd", "</s>"]
    texts = ["A", "", "é", " b", "", "ü", ""]
    assert page.evaluate(script, [tokens, texts]) == [["A", "A"], ["\ufffd", "é"], [" b", " b"], ["\ufffd", "ü"]]


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_scrolls_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 740})
    run(page, speculative_num_draft_tokens=16)
    page.click("#compare")
    playwright.expect(page.locator("#comparison")).to_be_visible()
    for tab in ("playground", "live", "cache"):
        page.click(f"#tab-{tab}")
        playwright.expect(page.locator("#value-running" if tab == "live" else f"#{tab}")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_live_numbers(page):
    page.click("#tab-live")
    playwright.expect(page.locator("#value-running")).to_have_text("3")
    playwright.expect(page.locator("#unit-running")).to_have_text("1 queued")
    playwright.expect(page.locator("#value-kv")).to_have_text("27 %")
    assert page.text_content("#health-text") == "serving" and page.is_hidden("#problem")


def test_live_begins_with_the_gateways_own_model(page, upstream):
    upstream.metrics = 'sglang:num_running_reqs{model="vllm_model",version="1"} 7\n' + upstream.metrics
    page.reload()
    page.click("#tab-live")
    playwright.expect(page.locator("#live-model option")).to_have_text(["llm", "vllm_model"])
    playwright.expect(page.locator("#value-running")).to_have_text("3")


def test_what_is_wrong_is_said(page, upstream):
    page.click("#tab-live")
    upstream.metrics = None
    playwright.expect(page.locator("#problem")).to_contain_text("REPORT_CUSTOM_METRICS")
    playwright.expect(page.locator("#health-text")).to_have_text("numbers off")


@pytest.mark.parametrize(
    ("engines", "said"),
    [([], "no engine does"), ([{"pid": 8, "error": "does not answer"}], "Engine 8: does not answer.")],
    ids=["none", "silent"],
)
def test_engines_that_are_down_are_said(page, upstream, engines, said):
    upstream.tree = {"engines": engines}
    page.reload()
    page.click("#tab-live")
    playwright.expect(page.locator("#problem")).to_contain_text(said)
    playwright.expect(page.locator("#health-text")).to_have_text("engine down")


def test_the_radix_tree(page, upstream):
    page.click("#tab-cache")
    cells = page.locator("#engines .cell")
    playwright.expect(cells).to_have_count(len(NODES))
    widths = [cell.bounding_box()["width"] for cell in cells.all()]
    assert widths[0] == pytest.approx(sum(widths[1:]) * 600 / 100, rel=0.02)  # its own 500 tokens and the 100 below
    cells.first.focus()
    assert page.text_content("#cache-detail").startswith("500 tokens, 100 more below: used last, found 9 times, in use")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#cache-detail").startswith("60 tokens: used 5,000 uses")
    upstream.tree = None
    playwright.expect(page.locator("#cache-problem")).to_contain_text("does not show its tree")
    assert page.is_hidden("#cache-view")


def test_the_theme_can_be_chosen(page):
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    dark = page.evaluate(colour)
    page.reload()
    assert page.evaluate(colour) == dark != light


def test_the_real_server(chromium, url, client):
    """Each of its numbers, traces and trees is read as it is meant."""
    question = [{"role": "user", "content": "Tom has 3 apples and buys 4 more."}]
    answer = client.chat.completions.create(model=MODEL, messages=question, max_tokens=40, temperature=0)
    with opened(chromium, url) as page:
        run(page, prompt=question[0]["content"], max_tokens=40)
        assert page.text_content("#answer") == answer.choices[0].message.content
        assert int(page.text_content("#total-tokens")) == answer.usage.completion_tokens
        assert page.locator("#answer .draft").count() > 0
        page.click("#compare")
        playwright.expect(page.locator("#comparison")).to_contain_text("The texts are equal.")
        page.click("#tab-live")
        playwright.expect(page.locator("#value-running")).to_have_text("0")
        playwright.expect(page.locator("#positions .row").first).to_be_visible()
        page.click("#tab-cache")
        playwright.expect(page.locator("#engines .cell").first).to_be_visible()

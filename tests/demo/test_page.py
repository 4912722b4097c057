"""The page in a real browser: upload, generate, move the controls, two visitors at once, mistakes."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest
from PIL import Image

import dyrate_kernels as dk
from dyrate_kernels import shapes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None] + ([] if CHROMIUM else ["chromium"])
pytestmark = [pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"), pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def address():
    from dyrate_kernels.demo import app
    from dyrate_kernels.demo.engine import Engine

    page, (_, url, _) = app.launch(Engine(*dk.load_demo()), "127.0.0.1", None, prevent_thread_lock=True)
    yield url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visitor:
    """One window."""

    def __init__(self, browser, address, width=1280, as_it_is=False):
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.requests = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_default_timeout(90_000)
        self.page.goto(address)
        self.page.wait_for_selector("#ask")
        self.page.wait_for_selector("#picture img")  # the first example, which is there from the start
        self.page.wait_for_timeout(300)
        if not as_it_is:  # one picture, which the bundled model knows
            self.page.locator("#frames").get_by_label("1", exact=True).check()
            self.page.get_by_label("recoverable").check()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def text(self, name):
        return self.page.locator(f"#{name} textarea").input_value()

    def figures(self):
        return self.page.locator("#figures").inner_text()

    def ask(self):
        self.page.click("#ask")

    def wait(self):
        """Until both answers are there."""
        self.page.wait_for_function("() => /answers (are the same|differ)/.test(document.querySelector('#words').innerText)")
        return self.text("plain"), self.text("pruned")

    def compare(self):
        self.ask()
        self.page.wait_for_function("() => !/answers (are the same|differ)/.test(document.querySelector('#words').innerText)")
        return self.wait()

    def upload(self, file):
        remove = self.page.locator("#picture button[aria-label*='lear'], #picture button[aria-label*='emove']")
        if remove.count():
            remove.first.click()
        self.page.set_input_files("#picture input[type=file]", str(file))
        self.page.wait_for_selector("#picture img")
        self.page.wait_for_timeout(500)  # the upload itself

    def slide(self, name, value):
        number = self.page.locator(f"#{name} input[type=number]")
        number.fill(str(value))
        number.press("Enter")

    def read(self):
        """The row of visual rows read, in percent."""
        line = next(line for line in self.figures().splitlines() if line.startswith("visual rows read"))
        return float(line.rstrip("% ").split()[-1].rstrip("%"))

    def kept_picture(self):
        self.page.wait_for_selector("#kept img")
        return self.page.locator("#kept img").get_attribute("src")


def answer(picture, policy, **options):
    """By hand."""
    from dyrate_kernels import chat

    model, processor = dk.load_demo()
    inputs = processor(images=picture, text=chat.render(processor, [chat.user("Describe the picture.", images=1)]), return_tensors="pt")
    with dk.patch(model, policy, **options):
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=96)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_upload_compare_and_move_the_controls(browser, address, tmp_path):
    picture = shapes.draw(shapes.make_scene(77))
    picture.save(tmp_path / "mine.png")
    with Visitor(browser, address) as visitor:
        visitor.upload(tmp_path / "mine.png")
        plain, pruned = visitor.compare()
        assert (plain, pruned) == (answer(picture, "none"), answer(picture, "dyrate"))
        first, shown = visitor.read(), visitor.kept_picture()
        assert 5 < first < 95
        visitor.slide("step", 0)  # the prompt of `recoverable` reads everything: another picture
        visitor.page.wait_for_function("old => document.querySelector('#kept img').src !== old", arg=shown)
        visitor.slide("strength", 0.9)
        visitor.compare()
        assert visitor.read() < first  # the slider prunes
        visitor.slide("strength", 0.1)
        visitor.compare()
        assert visitor.read() > first
        outside = [url for url in visitor.requests if not url.startswith(("http://127.0.0.1", "data:", "blob:", "ws://127.0.0.1"))]
        assert not outside, outside


@pytest.mark.parametrize("width", [1280, 400])
def test_the_first_comparison_shows_work_and_the_record(browser, address, width):
    """As the page opens: twenty frames, fewer bytes a token, differences marked, and what real shapes gained beside it."""
    with Visitor(browser, address, width, as_it_is=True) as visitor:
        visitor.slide("length", 24)
        plain, pruned = visitor.compare()
        lines = {line.split("\t")[0]: line.split("\t")[1:] for line in visitor.figures().splitlines() if "\t" in line}
        assert lines["visual tokens read in the last step"][0] == "2880"
        left, right = (float(text.split()[0]) for text in lines["bytes per token"])
        assert right < 0.6 * left and visitor.kept_picture()
        words = visitor.page.locator("#words")
        marked = words.locator("p.aligned")
        assert words.inner_text().startswith("Pruned was ") and "pruned or not" in words.inner_text()
        if plain == pruned:
            assert marked.count() == 0
        else:
            kept = marked.evaluate(
                "(p, drop) => [...p.childNodes].filter(n => n.nodeName !== drop).map(n => n.textContent).join(' ')", "INS"
            )
            assert kept.split() == plain.split()
        assert "8.8 ms for 17.3 ms" in visitor.page.locator("#record").inner_text()
        wide = visitor.page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1]


@pytest.mark.parametrize("width", [1280, 400])
def test_pressing_the_button_shows_the_answers(browser, address, width):
    """In one screen, while both are written: the texts, what is read now, and the patches; the settings are behind or beside them."""
    inside = "(e) => { const r = e.getBoundingClientRect(); return r.top >= 0 && r.top < window.innerHeight - 100; }"
    with Visitor(browser, address, width, as_it_is=True) as visitor:
        visitor.slide("length", 96)
        visitor.page.locator("#ask").scroll_into_view_if_needed()
        visitor.ask()
        visitor.page.wait_for_function("() => /now reads .* of 2880/.test(document.querySelector('#words').innerText)")
        visitor.page.wait_for_timeout(1000)  # the page scrolls smoothly
        for name in ("#plain", "#pruned", "#words", "#kept"):
            assert visitor.page.locator(name).evaluate(inside), name
        answers, settings = (visitor.page.locator(name).bounding_box() for name in ("#answers", "#settings"))
        beside = settings["x"] + settings["width"] <= answers["x"]
        assert beside if width > 760 else settings["y"] >= answers["y"] + answers["height"]
        visitor.page.click("#stop")
        visitor.page.wait_for_function("() => document.querySelector('#words').innerText.trim() === 'Stopped.'")


def test_policy_and_retention(browser, address):
    picture = shapes.draw(shapes.make_scene(3))  # the example that is there from the start
    with Visitor(browser, address) as visitor:
        visitor.page.locator("#policy input").click()
        visitor.page.get_by_role("option", name="fastv", exact=True).click()
        visitor.page.wait_for_function("() => !document.querySelector('input[value=pool]').checked")  # which fastv cannot have
        visitor.page.get_by_label("evict").check()
        plain, pruned = visitor.compare()
        assert pruned == answer(picture, dk.policies.FastV(k=3, rate=0.5), retention="evict") and plain == answer(picture, "none")
        assert "72" in next(line for line in visitor.figures().splitlines() if line.startswith("visual tokens read"))


def test_example(browser, address):
    with Visitor(browser, address) as visitor:
        before = visitor.page.locator("#picture img").get_attribute("src")
        visitor.page.locator("#examples button").nth(2).click()
        visitor.page.wait_for_function("old => ![null, old].includes(document.querySelector('#picture img')?.src ?? null)", arg=before)
        visitor.page.wait_for_timeout(300)  # shown before it is sent
        assert visitor.compare()[0] == answer(shapes.draw(shapes.make_scene(42)), "none")


def test_two_visitors_at_once(browser, address, tmp_path):
    pictures = [shapes.draw(shapes.make_scene(seed)) for seed in (5, 6)]
    with Visitor(browser, address) as one, Visitor(browser, address) as two:
        for visitor, picture, name in zip((one, two), pictures, "ab", strict=True):
            picture.save(tmp_path / f"{name}.png")
            visitor.upload(tmp_path / f"{name}.png")
        one.ask()
        two.ask()
        found = [visitor.wait() for visitor in (one, two)]
    assert found == [(answer(picture, "none"), answer(picture, "dyrate")) for picture in pictures]


def test_leaving_in_the_middle_leaves_nothing(browser, address):
    with Visitor(browser, address) as visitor:
        visitor.slide("length", 256)
        visitor.ask()
        visitor.page.wait_for_function("() => document.querySelector('#plain textarea').value.length > 5")
    with Visitor(browser, address) as visitor:
        assert visitor.compare()[0] == answer(shapes.draw(shapes.make_scene(3)), "none")


def test_mistakes_are_messages(browser, address, tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), dtype="uint8")).save(tmp_path / "tiny.png")
    with Visitor(browser, address) as visitor:
        visitor.page.locator("#picture button[aria-label*='lear'], #picture button[aria-label*='emove']").first.click()
        visitor.ask()
        visitor.page.get_by_text("Choose a picture first").wait_for()
        visitor.page.wait_for_function("() => !document.querySelector('#words').innerText.includes('Reading')")
        visitor.upload(tmp_path / "tiny.png")  # a picture, if a small one: it works
        visitor.compare()
        visitor.page.locator("#question textarea").fill("")
        visitor.ask()
        visitor.page.get_by_text("Ask something about the picture").wait_for()
        visitor.page.locator("#question textarea").fill("Describe the picture.")
        visitor.page.locator("#policy input").click()
        visitor.page.get_by_role("option", name="recycle", exact=True).click()
        visitor.page.get_by_label("evict").check()
        visitor.ask()
        visitor.page.get_by_text("use retention='recoverable'").wait_for()
        assert "Traceback" not in visitor.page.content()


def test_narrow_window_and_keyboard(browser, address):
    with Visitor(browser, address, width=390) as visitor:
        visitor.compare()
        wide = visitor.page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1]
        for label in ("Question", "Policy", "How much to prune", "Longest answer, tokens", "Every visual token", "Pruned"):
            assert visitor.page.get_by_label(label, exact=False).count() >= 1, label
        visitor.page.locator("#question textarea").focus()
        visitor.page.keyboard.press("Tab")
        assert visitor.page.evaluate("() => document.activeElement.id || document.activeElement.innerText") in ("ask", "Compare")
        visitor.page.keyboard.press("Enter")
        visitor.wait()

"""The page in a real Chromium, drawn for by tiny random models: nothing is learned here, so what is
checked is what people see, press and are told. Skipped where there is none (apt-get install
chromium).
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from pipeline.config.serve import LimitsConfig, ServeConfig
from pipeline.generation import png
from pipeline.generation.recipe import Recipe, rebuild
from pipeline.generation.sampler import Sampler
from pipeline.serving.api import make_app
from pipeline.serving.local import LocalArtist
from pipeline.serving.page import mount_page
from tests.untrained import save_controlnet, save_encoder, tiny_parts

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(900),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium"),
]
PATIENCE_MS = 90_000
"""A loaded machine needs as long for what an idle one shows at once."""


class Brush:
    """The models at a pace that a browser can see. go: cleared, a step that is told is the last for
    now. given_up: how often a drawing was broken off.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler, self.pause_s, self.given_up = sampler, 0.0, 0
        self.go = threading.Event()
        self.go.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def make(
        self, recipes: Sequence[Recipe], on_step: Callable[[int], None] | None = None
    ) -> list[Image.Image]:
        def slowly(done: int) -> None:
            time.sleep(self.pause_s)
            try:
                if on_step is not None:
                    on_step(done)
            except Exception:
                self.given_up += 1
                raise
            assert self.go.wait(120)

        return self._sampler.make(recipes, slowly)


@pytest.fixture(scope="module")
def brush(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Brush:
    parts = tiny_parts(tiny_models)
    root = tmp_path_factory.mktemp("root")
    save_encoder(root / "model", parts)
    cfg = ServeConfig(root=str(root), models=parts, device="cpu")
    net = save_controlnet(root / "net", parts)
    return Brush(Sampler.load(str(root / "model"), cfg, controlnet=net))


@contextmanager
def served(brush: Brush, controlnet: str | None) -> Iterator[str]:
    """Where the page is. controlnet: as its settings name it; none = without one."""
    limits = LimitsConfig(upload_mib=1, subjects=3, side=64)
    cfg = ServeConfig(device="cpu", steps=3, limits=limits, controlnet=controlnet)
    app = make_app(LocalArtist(brush, cfg, {"model": "tiny"}), cfg)  # type: ignore[arg-type]
    server = uvicorn.Server(
        uvicorn.Config(mount_page(app, app.state.artist, cfg), port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def address(brush: Brush) -> Iterator[str]:
    with served(brush, "edges") as found:
        yield found


@pytest.fixture(scope="module")
def window(address: str) -> Iterator[tuple[Page, list[str]]]:
    """The browser's page, and what it must not do: requests elsewhere, errors on its console."""
    faults: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=list(QUIET))
        page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        page.context.set_default_timeout(PATIENCE_MS)  # of other tabs too
        expect.set_options(timeout=PATIENCE_MS)
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))

        def heard(url: str) -> None:
            if not url.startswith((address, "data:", "blob:")):
                faults.append(url)

        page.on("request", lambda request: heard(request.url))
        page.on("response", lambda r: faults.append(f"{r.status} {r.url}") if not r.ok else None)
        yield page, faults
        browser.close()


@pytest.fixture
def page(window: tuple[Page, list[str]], address: str, brush: Brush) -> Iterator[Page]:
    """The page, loaded anew."""
    page, faults = window
    brush.pause_s = 0.0
    brush.go.set()
    page.goto("about:blank")
    faults.clear()  # what Gradio says of a stream that ends because the page is left
    page.goto(address)
    expect(page.locator("#gallery button").first).to_be_visible()
    yield page
    assert not faults, faults


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    return png.encode(image)


def upload(page: Page, number: int, data: bytes, name: str = "my cup.png") -> None:
    file: Any = {"name": name, "mimeType": "image/png", "buffer": data}
    page.locator(f"#card-{number} input[type=file]").set_input_files(file)


def carry(page: Page, number: int, how: str, data: bytes) -> None:
    """A picture onto a card as the mouse (drop) or the clipboard (paste) brings it."""
    page.locator(f"#card-{number} .card").evaluate(
        """(card, [how, data]) => {
            const carried = new DataTransfer();
            const bytes = new Uint8Array(data);
            carried.items.add(new File([bytes], "my cup.png", { type: "image/png" }));
            const said = { bubbles: true, cancelable: true };
            card.dispatchEvent(how === "drop"
                ? new DragEvent("drop", { dataTransfer: carried, ...said })
                : new ClipboardEvent("paste", { clipboardData: carried, ...said }));
        }""",
        [how, list(data)],
    )


def query(page: Page, number: int) -> Any:
    return page.get_by_label(f"Query of subject {number}")


def shown(page: Page, where: str) -> list[str]:
    """Addresses of the pictures under an element."""
    return page.locator(f"{where} img").evaluate_all("all => all.map(image => image.src)")


def pixels(url: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def wait(ready: Any, what: str) -> None:
    ends = time.monotonic() + PATIENCE_MS / 1000
    while not ready():
        assert time.monotonic() < ends, what
        time.sleep(0.05)


def test_a_word_shows_at_once_where_the_encoder_looks(page: Page) -> None:
    upload(page, 1, picture(0, (40, 32)))
    expect(page.locator("#card-1 canvas")).to_be_visible()
    query(page, 1).press_sequentially("cup", delay=20)
    expect(page.locator("#look-1")).to_contain_text("where the encoder looks for “cup”")
    (first,) = shown(page, "#look-1")
    assert pixels(first).shape == (32, 32, 3), "what CLIP sees is the central square"
    query(page, 1).fill("fish")
    expect(page.locator("#look-1")).to_contain_text("for “fish”")
    assert shown(page, "#look-1") != [first]
    query(page, 1).fill("")
    expect(page.locator("#look-1")).to_contain_text("paint over the subject")


def test_a_broken_upload_is_told_and_costs_nothing(page: Page) -> None:
    upload(page, 1, picture(0))
    query(page, 1).fill("cup")
    expect(page.locator("#look-1 img")).to_be_visible()
    upload(page, 1, b"no picture at all", "bad.png")
    expect(page.locator("#look-1 [role=alert]")).to_contain_text("bad.png: not a readable image")
    expect(page.locator("#card-1 canvas")).to_be_visible()
    expect(query(page, 1)).to_have_value("cup")
    upload(page, 1, b"x" * 2**20, "large.png")
    expect(page.locator("#card-1 [data-part=note]")).to_contain_text("make it smaller than 0.7 MiB")
    query(page, 1).fill("fish")  # goes on with what was there
    expect(page.locator("#look-1")).to_contain_text("for “fish”")


def test_a_mask_is_painted_with_the_mouse_and_with_the_keyboard(page: Page) -> None:
    carry(page, 1, "drop", picture(0))
    canvas = page.locator("#card-1 canvas")
    expect(canvas).to_be_visible()
    box = canvas.bounding_box()
    assert box
    left, middle = box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2
    page.mouse.move(left, middle - 60)
    page.mouse.down()
    page.mouse.move(left, middle + 60, steps=4)
    page.mouse.up()
    expect(page.locator("#look-1")).to_contain_text("what you painted")
    glow = pixels(shown(page, "#look-1")[0]).astype(int).sum(axis=2)
    assert glow[:, 6:10].mean() > 2 * glow[:, 20:].mean(), "it glows where it was painted"

    page.get_by_role("button", name="Clear mask").first.click()
    expect(page.locator("#look-1 img")).to_have_count(0)
    canvas.focus()
    for key in ("ArrowRight", "ArrowRight", "Space"):
        page.keyboard.press(key)
    expect(page.locator("#look-1")).to_contain_text("what you painted")
    glow = pixels(shown(page, "#look-1")[0]).astype(int).sum(axis=2)
    assert glow[16, 20] > 2 * glow[16, 8]


def test_two_subjects_are_drawn_beside_scale_0(page: Page, brush: Brush, tmp_path: Path) -> None:
    upload(page, 1, picture(0))
    query(page, 1).fill("cup")
    page.get_by_role("button", name="Add a subject").click()
    carry(page, 2, "paste", picture(1))
    query(page, 2).fill("fish")
    expect(page.locator("#look-2")).to_contain_text("for “fish”")
    page.get_by_label("Where subject 2 may act").click()
    page.get_by_role("option", name="four numbers").click()
    page.get_by_label("Region of subject 2").fill("0.5,0,1,0.5")
    page.get_by_label("number input for Scale of subject 2").fill("0.8")

    page.locator("#draw").click()
    complaint = page.locator("#complaint [role=alert]")
    expect(complaint).to_contain_text("prompt: missing; say what to draw")
    page.get_by_label("Prompt", exact=True).fill("a cup and a fish on sand")
    page.get_by_label("Seed", exact=True).fill("7")
    brush.go.clear()
    page.locator("#draw").click()
    expect(page.locator("#progress")).to_contain_text("step 1 of 6")
    expect(page.locator("#progress progress")).to_be_visible()
    brush.go.set()
    expect(page.locator("#results img")).to_have_count(2)
    expect(page.locator("#progress progress")).to_have_count(0)
    expect(complaint).to_have_count(0)

    with page.expect_download() as download:
        page.get_by_label("Download With subjects").click()
    download.value.save_as(tmp_path / "drawn.png")
    data = (tmp_path / "drawn.png").read_bytes()
    about = png.made_by(data)
    assert about is not None
    recipe = rebuild(about["recipe"], png.sources(data))
    assert (recipe.prompt, recipe.seed, recipe.steps) == ("a cup and a fish on sand", 7, 3)
    assert [s.query for s in recipe.subjects] == ["cup", "fish"]
    assert [s.name for s in recipe.subjects] == ["my cup", "my cup"]
    assert [s.scale for s in recipe.subjects] == [1.0, 0.8]
    assert [s.region for s in recipe.subjects] == [None, (0.5, 0.0, 1.0, 0.5)]
    with Image.open(io.BytesIO(picture(1))) as second:
        assert recipe.subjects[1].image.tobytes() == second.convert("RGB").tobytes()
    ours, plain = (pixels(url) for url in shown(page, "#results"))
    assert np.array_equal(ours, np.asarray(png.picture(data).convert("RGB")))
    (alone,) = brush.make([recipe.without_subjects()])
    assert np.array_equal(plain, np.asarray(alone)) and not np.array_equal(ours, plain)

    page.get_by_role("button", name="Remove subject 1").click()
    expect(query(page, 1)).to_have_value("fish")
    expect(page.locator("#card-2")).to_have_count(0)
    expect(page.locator("#results img")).to_have_count(2)


def test_giving_up_ends_the_drawing_and_keeps_what_was_there(
    page: Page, brush: Brush, address: str
) -> None:
    page.get_by_label("Prompt", exact=True).fill("a cup")
    page.locator("#draw").click()
    expect(page.locator("#results img")).to_have_count(1)  # no subjects: the base model alone
    before = shown(page, "#results")
    brush.pause_s, given_up = 0.3, brush.given_up
    page.get_by_label("number input for Steps").fill("100")
    page.locator("#draw").click()
    expect(page.locator("#progress")).to_contain_text("s left")
    page.locator("#cancel").click()
    wait(lambda: brush.given_up > given_up, "the artist is drawing for nobody")
    expect(page.locator("#progress progress")).to_have_count(0)
    assert shown(page, "#results") == before

    tab = page.context.new_page()
    tab.goto(address)
    tab.get_by_label("Prompt", exact=True).fill("a cup")
    tab.get_by_label("number input for Steps").fill("100")
    tab.locator("#draw").click()
    expect(tab.locator("#progress")).to_contain_text(re.compile(r"step [1-9]\d* of 100"))
    tab.close()
    wait(lambda: brush.given_up > given_up + 1, "the artist draws for a closed tab")


def test_an_example_fills_the_form_and_can_be_shared(page: Page) -> None:
    page.locator("#gallery button").last.click()
    for number in (1, 2):
        expect(page.locator(f"#look-{number} img")).to_be_visible()
    prompt = page.get_by_label("Prompt", exact=True).input_value()
    assert all(query(page, number).input_value() in prompt for number in (1, 2))
    page.get_by_role("button", name="Share the settings").click()
    page.get_by_role("button", name="Write them down").click()
    expect(page.locator("#shared a")).to_have_count(2)

    def text(title: str) -> str:
        return page.locator(f"#shared pre[aria-label^='{title}']").inner_text()

    said = json.loads(text("JSON"))
    assert said["recipe"]["prompt"] == prompt and said["model"] == "tiny"
    assert [s["region"] for s in said["recipe"]["subjects"]] == [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]
    snippet = text("Python")
    compile(snippet, "snippet.py", "exec")
    assert repr(prompt) in snippet and "region=region(0.5, 0.0, 1.0, 1.0)" in snippet
    assert "--image subject-1.png subject-2.png" in text("Command")
    page.get_by_role("button", name="Copy Python").click()
    assert page.evaluate("getSelection().toString()").strip() == snippet.strip()
    page.locator("#gallery button").first.click()  # one subject again
    expect(page.locator("#card-2")).to_have_count(0)


def test_another_size_and_a_control_image_are_drawn_and_shared(page: Page, brush: Brush) -> None:
    page.get_by_label("Prompt", exact=True).fill("a cup")
    page.get_by_role("button", name="More").click()
    page.get_by_label("Width", exact=True).fill("50")
    page.locator("#draw").click()
    complaint = page.locator("#complaint [role=alert]")
    expect(complaint).to_contain_text("size: one side is missing")
    page.get_by_label("Height", exact=True).fill("32")
    page.locator("#draw").click()
    expect(complaint).to_contain_text("50x32; this base model draws sides that are multiples of 8")
    page.get_by_label("Width", exact=True).fill("72")
    page.locator("#draw").click()
    expect(complaint).to_contain_text("width: 72 is not within 0 to 64")
    page.get_by_label("Width", exact=True).fill("48")

    chooser: Any = page.locator("#control input[type=file]")
    chooser.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    wrong = page.locator("#control-wrong [role=alert]")
    expect(wrong).to_contain_text("a.png: not a readable image")
    edges = picture(2, (40, 32))
    chooser.set_input_files({"name": "edges.png", "mimeType": "image/png", "buffer": edges})
    expect(page.get_by_alt_text("The control image")).to_be_visible()
    expect(wrong).to_have_count(0)
    page.get_by_label("number input for Scale of the control image").fill("0.6")
    page.locator("#draw").click()
    expect(page.locator("#results img")).to_have_count(1)
    expect(page.locator("#progress progress")).to_have_count(0)
    expect(complaint).to_have_count(0)
    asked = Recipe("a cup", steps=3, size=(48, 32), control_scale=0.6)
    asked = replace(asked, control=png.picture(edges).convert("RGB"))
    (expected,), (plain,) = brush.make([asked]), brush.make([replace(asked, control=None)])
    (followed,) = shown(page, "#results")
    assert np.array_equal(pixels(followed), np.asarray(expected))

    page.get_by_role("button", name="Share the settings").click()
    page.get_by_role("button", name="Write them down").click()
    expect(page.locator("#shared a")).to_have_text("control.png")
    said = json.loads(page.locator("#shared pre[aria-label^='JSON']").inner_text())
    assert said["recipe"] == asked.describe()
    snippet = page.locator("#shared pre[aria-label^='Python']").inner_text()
    assert "StableDiffusionControlNetPipeline" in snippet and "width=48," in snippet

    page.get_by_role("button", name="Remove it").click()
    expect(page.get_by_alt_text("The control image")).to_be_hidden()
    page.locator("#draw").click()
    wait(lambda: shown(page, "#results") != [followed], "it is still followed")
    assert np.array_equal(pixels(shown(page, "#results")[0]), np.asarray(plain))


def test_without_a_controlnet_there_is_no_place_for_its_image(window: Any, brush: Brush) -> None:
    page, _ = window
    with served(brush, None) as there:
        page.goto(there)
        page.get_by_label("Prompt", exact=True).fill("a cup")
        expect(page.get_by_text("Control image")).to_have_count(0)
        page.locator("#draw").click()
        expect(page.locator("#results img")).to_have_count(1)
        page.goto("about:blank")


def test_it_fits_a_telephone_and_everything_has_a_name(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#gallery button").first.click()
    expect(page.locator("#look-1 img")).to_be_visible()
    for name in ("More", "Share the settings", "Write them down"):
        page.get_by_role("button", name=name).click()
    expect(page.locator("#shared pre")).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, canvas")]
        .filter(e => e.offsetParent && !e.labels?.length && !e.innerText?.trim()
            && !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby") && !e.title)
        .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    page.set_viewport_size({"width": 1280, "height": 1000})

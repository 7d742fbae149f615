"""Requests side by side on one device: who goes with whom, who is refused, who is let down."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import ServeConfig
from pipeline.errors import UserError
from pipeline.generation import png
from pipeline.generation.recipe import Recipe, Reference, rebuild
from pipeline.serving.artist import Busy, Drawn, Gone, Late, Step
from pipeline.serving.local import LocalArtist
from tests.pipeline.serving.painter import PATIENCE_S, Painter
from tests.untrained import save_controlnet, save_encoder, tiny_parts


def artist(painter: Painter, **settings: Any) -> LocalArtist:
    given = {"batch": 4, "batch_wait_ms": 0, "queue": 8, **settings}
    return LocalArtist(painter, ServeConfig(**given))  # type: ignore[arg-type]


def recipe(prompt: str, steps: int = 3, seed: int = 0) -> Recipe:
    return Recipe(prompt, steps=steps, seed=seed)


async def drawn(of: LocalArtist, asked: Recipe, within_s: float = PATIENCE_S) -> Drawn:
    told = [each async for each in of.draw(asked, within_s)]
    steps, last = told[:-1], told[-1]
    assert isinstance(last, Drawn)
    assert [step.done for step in steps if isinstance(step, Step)][-1] == asked.steps
    return last


async def outcome(of: LocalArtist, asked: Recipe, within_s: float = PATIENCE_S) -> Any:
    """What came of it: the picture, or the exception."""
    (found,) = await asyncio.gather(drawn(of, asked, within_s), return_exceptions=True)
    return found


async def at_work(painter: Painter) -> None:
    assert await asyncio.to_thread(painter.begun.acquire, timeout=PATIENCE_S)


async def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            await test

    asyncio.run(bounded())


async def behind_a_first(
    painter: Painter, of: LocalArtist, then: Callable[[], Awaitable[None]]
) -> None:
    """`then` happens while another picture is being drawn, which is let go after it."""
    painter.go.clear()
    first = asyncio.create_task(drawn(of, recipe("first")))
    await at_work(painter)
    await then()
    painter.go.set()
    await first


def test_alike_ones_that_wait_are_drawn_together() -> None:
    async def test() -> None:
        painter = Painter()
        of, tasks = artist(painter), list[asyncio.Task[Drawn]]()

        async def ask() -> None:
            tasks.extend(
                asyncio.create_task(drawn(of, recipe(f"p{i}", seed=10 * i))) for i in range(8)
            )
            await asyncio.sleep(0.05)

        await behind_a_first(painter, of, ask)
        pictures = await asyncio.gather(*tasks)
        assert painter.batches == [["first"], [f"p{i}" for i in range(4)], ["p4", "p5", "p6", "p7"]]
        assert painter.steps == 9, "for nine pictures of three steps"
        assert [each.batch for each in pictures] == [4] * 8
        for i, each in enumerate(pictures):  # each its own
            assert png.picture(each.png).getpixel((0, 0)) == (10 * i, 0, 0)
            said = png.made_by(each.png)
            assert said and said["recipe"]["prompt"] == f"p{i}"
        assert of.close(PATIENCE_S)

    run(test())


def test_the_first_waits_for_others_and_no_longer() -> None:
    async def test() -> None:
        painter = Painter()
        of = artist(painter, batch_wait_ms=1000)
        await asyncio.gather(*(drawn(of, recipe(f"p{i}")) for i in range(3)))
        assert painter.batches == [["p0", "p1", "p2"]]
        began = time.monotonic()
        await drawn(of, recipe("alone"))
        assert time.monotonic() - began >= 1
        painter.batches.clear()
        await asyncio.gather(*(drawn(of, recipe(f"p{i}", steps=2 + i % 2)) for i in range(4)))
        assert sorted(painter.batches) == [["p0", "p2"], ["p1", "p3"]], "by their steps"

    run(test())


def test_a_full_queue_refuses_at_once() -> None:
    async def test() -> None:
        painter = Painter()
        of, tasks = artist(painter, queue=2), list[asyncio.Task[Any]]()

        async def ask() -> None:
            tasks.extend(asyncio.create_task(outcome(of, recipe(f"p{i}"))) for i in range(5))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=5)
            await until(lambda: sum(task.done() for task in tasks) == 3)
            assert all(isinstance(task.result(), Busy) for task in done)

        await behind_a_first(painter, of, ask)
        found = await asyncio.gather(*tasks)
        assert sum(isinstance(each, Drawn) for each in found) == 2
        assert isinstance(await outcome(of, recipe("later")), Drawn)
        none = artist(Painter(), queue=0, batch=1)
        assert isinstance(await outcome(none, recipe("a")), Drawn), "an idle thread takes one"

    run(test())


def test_what_is_late_while_it_waits_is_never_drawn() -> None:
    async def test() -> None:
        painter = Painter()
        of = artist(painter)

        async def ask() -> None:
            began = time.monotonic()
            assert isinstance(await outcome(of, recipe("late"), within_s=0.1), Late)
            assert time.monotonic() - began < 5, "and told so while the device is at work"

        await behind_a_first(painter, of, ask)
        await drawn(of, recipe("next"))
        assert painter.batches == [["first"], ["next"]]

    run(test())


def test_a_batch_ends_when_nobody_waits_for_it() -> None:
    async def test() -> None:
        painter = Painter()
        of = artist(painter, batch=2, batch_wait_ms=1000)
        painter.go.clear()
        late = asyncio.create_task(outcome(of, recipe("late", steps=1000), within_s=2))
        gone = asyncio.create_task(outcome(of, recipe("gone", steps=1000)))
        await at_work(painter)
        assert isinstance(await late, Late)
        gone.cancel()
        await asyncio.wait([gone])
        painter.go.set()
        await drawn(of, recipe("next"))
        assert [sorted(batch) for batch in painter.batches] == [["gone", "late"], ["next"]]
        assert painter.steps < 10, "of a thousand"

    run(test())


def test_a_batch_goes_on_for_the_one_who_waits() -> None:
    async def test() -> None:
        painter = Painter()
        of = artist(painter, batch=2, batch_wait_ms=1000)
        painter.go.clear()
        stays = asyncio.create_task(drawn(of, recipe("stays", steps=5)))
        leaves = of.draw(recipe("leaves", steps=5), PATIENCE_S)
        async with aclosing(leaves):  # type: ignore[type-var]
            first = asyncio.ensure_future(anext(leaves))
            await at_work(painter)
            painter.go.set()
            assert await first == Step(1, 5)
        assert (await stays).batch == 2 and painter.steps == 5

    run(test())


def test_one_bad_recipe_does_not_fail_the_others() -> None:
    async def test() -> None:
        painter = Painter()
        of = artist(painter, batch=3, batch_wait_ms=1000)
        asked = [recipe("good"), recipe("wrong"), recipe("fine")]
        good, wrong, fine = await asyncio.gather(*(outcome(of, each) for each in asked))
        assert isinstance(good, Drawn) and isinstance(fine, Drawn)
        assert isinstance(wrong, UserError) and str(wrong) == "wrong: cannot be drawn"
        assert painter.batches == [["good", "wrong", "fine"], ["good"], ["wrong"], ["fine"]]

    run(test())


def test_any_other_fault_is_everybodys_and_the_thread_goes_on() -> None:
    async def test() -> None:
        painter = Painter()
        of = artist(painter, batch_wait_ms=200)
        found = await asyncio.gather(*(outcome(of, recipe(f"broken {i}")) for i in range(2)))
        assert [type(each) for each in found] == [RuntimeError] * 2 and of.well
        assert isinstance(await outcome(of, recipe("good")), Drawn)
        for i in range(3):
            assert isinstance(await outcome(of, recipe(f"broken {i}")), RuntimeError)
        assert not of.well, "three in a row: the device may be lost"
        with pytest.raises(Gone):
            await of.facts()

    run(test())


def test_a_dead_thread_hangs_nobody() -> None:
    async def test() -> None:
        painter = Painter()
        of = artist(painter, batch_wait_ms=50)
        asked = [recipe("dead"), recipe("waits", steps=4)]
        found = await asyncio.gather(*(outcome(of, each) for each in asked))
        assert [type(each) for each in found] == [Gone, Gone]
        assert isinstance(await outcome(of, recipe("later")), Gone) and not of.well

    run(test())


def test_closing_finishes_what_waits() -> None:
    async def test() -> None:
        painter = Painter()
        of, tasks = artist(painter), list[asyncio.Task[Any]]()

        async def ask() -> None:
            tasks.append(asyncio.create_task(outcome(of, recipe("waits"))))
            await asyncio.sleep(0.05)
            assert not await asyncio.to_thread(of.close, 0.05)
            assert isinstance(await outcome(of, recipe("later")), Gone)

        await behind_a_first(painter, of, ask)
        assert isinstance(await tasks[0], Drawn)
        assert of.close(PATIENCE_S)

    run(test())


def test_what_the_models_do_not_have_is_refused_before_it_waits() -> None:
    async def test() -> None:
        of = artist(Painter())
        control = Recipe("a cup", control=Image.new("RGB", (8, 8)))
        for asked, reason in ((Recipe("a cup", size=(30, 32)), "size"), (control, "control")):
            with pytest.raises(UserError, match=reason):
                await drawn(of, asked)
        (look,) = await of.look(Image.new("RGB", (40, 30)), ["cup"], PATIENCE_S)
        assert look.box == (0, 0, 40, 30) and look.attention.shape == (8, 8)
        with pytest.raises(UserError, match="no such word"):
            await of.look(Image.new("RGB", (40, 30)), ["wrong"], PATIENCE_S)

    run(test())


@pytest.fixture(scope="module")
def root(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    save_encoder(folder / "model", tiny_parts(tiny_models))
    return folder


def test_eight_at_once_on_the_models(root: Path, tiny_models: Path) -> None:
    cfg = ServeConfig(
        root=str(root), models=tiny_parts(tiny_models), device="cpu", batch=8, batch_wait_ms=500
    )
    of = LocalArtist.load(cfg)
    calls = list[int]()
    unet = of._sampler._pipe.unet
    unet.register_forward_pre_hook(lambda *_: calls.append(1))
    noise = np.random.default_rng(0).integers(0, 255, (8, 30, 40, 3), dtype=np.uint8)

    def asked(i: int) -> Recipe:
        subject = Reference(Image.fromarray(noise[i]), query="cup")
        return Recipe("a cup on snow", (subject,), steps=3, seed=i)

    async def test() -> None:
        together = await asyncio.gather(*(drawn(of, asked(i)) for i in range(8)))
        assert len(calls) == 3, "U-Net calls, for eight pictures of three steps"
        assert {each.batch for each in together} == {8}
        alone = await drawn(of, asked(5))
        pixels = [np.asarray(Image.open(io.BytesIO(d.png)), int) for d in (together[5], alone)]
        assert abs(pixels[0] - pixels[1]).max() <= 1, "nobody sees with whom it was drawn"
        said = png.made_by(alone.png)
        assert said and len(said["model"]) == 64 and said["base"] and said["vision"]
        again = rebuild(said["recipe"], png.sources(alone.png))
        assert (await drawn(of, again)).png == alone.png
        facts = await of.facts()
        assert (facts.side, facts.step, facts.device) == (32, 8, "cpu")

    run(test())


def test_a_control_image_and_another_size(root: Path, tiny_models: Path) -> None:
    parts = tiny_parts(tiny_models)
    cfg = ServeConfig(
        root=str(root), models=parts, device="cpu", batch_wait_ms=500,
        controlnet=save_controlnet(root / "net", parts),
    )  # fmt: skip
    of = LocalArtist.load(cfg)
    noise = np.random.default_rng(0).integers(0, 255, (3, 30, 40, 3), dtype=np.uint8)
    subject, *edges = (Image.fromarray(each) for each in noise)
    asked = Recipe("a cup", (Reference(subject, query="cup"),), steps=2, size=(48, 32))

    async def test() -> None:
        facts = await of.facts()
        assert facts.controlnet and facts.models["controlnet"]
        wanted = [asked, *(replace(asked, control=each, control_scale=0.8) for each in edges)]
        plain, one, other = await asyncio.gather(*(drawn(of, each) for each in wanted))
        assert [each.batch for each in (plain, one, other)] == [1, 2, 2]
        pictures = [png.picture(each.png) for each in (plain, one, other)]
        assert {each.size for each in pictures} == {(48, 32)}
        assert len({each.tobytes() for each in pictures}) == 3, "each follows its own"
        said = png.made_by(one.png)
        assert said and rebuild(said["recipe"], png.sources(one.png)).control_scale == 0.8

    run(test())


def test_a_mask_outside_of_what_clip_sees_costs_the_others_nothing(
    root: Path, tiny_models: Path
) -> None:
    cfg = ServeConfig(
        root=str(root), models=tiny_parts(tiny_models), device="cpu", batch_wait_ms=500
    )
    of = LocalArtist.load(cfg)
    wide = Image.new("RGB", (96, 32), "green")
    edge = Image.new("L", wide.size)
    edge.paste(255, (0, 0, 8, 32))

    async def test() -> None:
        asked = [Reference(wide, query="cup"), Reference(wide, mask=edge)]
        good, bad = await asyncio.gather(
            *(outcome(of, Recipe("a cup", (each,), steps=2)) for each in asked)
        )
        assert isinstance(good, Drawn) and isinstance(bad, UserError), bad
        assert "\n" not in str(bad)

    run(test())

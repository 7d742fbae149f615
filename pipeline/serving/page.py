"""The page on the service: layout and wiring (Gradio). What it does stands in page_acts.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from pipeline.config.serve import ServeConfig
from pipeline.serving import page_shows
from pipeline.serving.artist import Artist
from pipeline.serving.page_acts import Acts
from pipeline.serving.page_card import Card, card_component, control_component
from pipeline.serving.page_form import FOUR_NUMBERS, PER_SUBJECT, REGIONS
from pipeline.serving.page_gate import PageGate

_SESSIONS = 200
"""Browsers whose values Gradio remembers; each may hold some pictures."""
_BESIDE = 40
"""Events that go on at once beside the drawings that the service lets in."""
_FORGET_S = 600
"""Age at which a file in Gradio's cache is deleted, s; the page itself makes none."""
_PRESSED = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-example]");
  if (button) trigger("choose", { index: Number(button.dataset.example) });
});"""
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""The documented API is the service's own, and progress is shown by the page itself."""
_COPIED = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const text = button.closest("section").querySelector("pre");
  getSelection().selectAllChildren(text);
  if (navigator.clipboard) {  // on https and on this machine alone; elsewhere it is selected
    navigator.clipboard.writeText(text.textContent).then(() => { button.textContent = "Copied"; });
  }
});"""
_NEW_SEED = "() => Math.floor(Math.random() * 2 ** 31)"


_EMPTY = [Card().write(), 1, "everywhere", ""]
"""A subject's widgets when nothing is chosen."""


def mount_page(app: FastAPI, artist: Artist, cfg: ServeConfig) -> FastAPI:
    """Put the page at /, behind the routes and the middleware that `app` has (api.make_app)."""
    before = list(app.routes)
    gr.mount_gradio_app(
        app,
        build_page(artist, cfg),
        path="/",
        server_name=cfg.host,
        server_port=cfg.port,
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=cfg.limits.upload_mib * 2**20,
        allowed_paths=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css_paths=[Path(__file__).with_name("page.css")],
    )
    mounted: Any = app.routes[-1]
    mounted.app = PageGate(mounted.app, before)
    return app


def build_page(artist: Artist, cfg: ServeConfig) -> gr.Blocks:
    """The page, to be mounted."""
    acts = Acts(artist, cfg, cfg.limits.subjects)
    blocks = gr.Blocks(
        analytics_enabled=False,
        title="SSR on Ray",
        fill_width=True,
        delete_cache=(_FORGET_S, _FORGET_S),
    )
    blocks.state_session_capacity = _SESSIONS
    # each event that goes on holds one; a crowd's drawings must not keep anybody's Cancel waiting
    blocks.max_threads = cfg.room + _BESIDE
    with blocks:
        head = gr.HTML(page_shows.head(), elem_id="head", apply_default_css=False)
        with gr.Row(elem_id="table"):
            with gr.Column(scale=6, min_width=320):
                subjects = _Subjects(cfg, acts)
            with gr.Column(scale=5, min_width=320):
                words = _words(cfg, acts)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    cancel = gr.Button("Cancel", elem_id="cancel")
                complaint = gr.HTML(elem_id="complaint", apply_default_css=False)
                progress = gr.HTML(elem_id="progress", apply_default_css=False)
                results = gr.HTML(
                    '<div class="empty wide">Your picture, and beside it what the base model draws '
                    "from the same noise, show here.</div>",
                    elem_id="results",
                    apply_default_css=False,
                )
        gr.Markdown("### Examples: held-out scenes of the mini world")
        chooser = gr.HTML(elem_id="gallery", js_on_load=_PRESSED, apply_default_css=False)
        with gr.Accordion("Share the settings", open=False, elem_id="share"):
            share = gr.Button("Write them down", elem_id="write")
            shared = gr.HTML(elem_id="shared", js_on_load=_COPIED, apply_default_css=False)

        form = [*subjects.inputs, *words]
        gr.on(
            [draw.click, words[0].submit],
            acts.draw, form, [progress, results, complaint],
            concurrency_limit=None, trigger_mode="once", **_QUIET,
        )  # fmt: skip
        # not by Gradio's `cancels`: it ends the browser's stream, and this event's answer with it
        cancel.click(acts.cancel, None, None, concurrency_limit=None, **_QUIET)
        share.click(acts.share, form, shared, concurrency_limit=None, **_QUIET)
        chooser.choose(  # type: ignore[operator]
            subjects.choose, None, [*subjects.outputs, words[0]], concurrency_limit=None, **_QUIET
        )
        blocks.load(acts.greet, None, [head, chooser], concurrency_limit=None, **_QUIET)
    blocks.queue(api_open=False, max_size=cfg.queue + 8 * cfg.limits.subjects)
    return blocks


def _words(cfg: ServeConfig, acts: Acts) -> list[Any]:
    """The widgets of the prompt and the denoising, in the order of Form's fields."""
    most = cfg.limits.text
    prompt = gr.Textbox(
        label="Prompt", placeholder="a cup on snow", max_length=most, elem_id="prompt"
    )
    with gr.Row(elem_id="noise"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120)
        gr.Button("New seed", elem_id="new-seed", min_width=100).click(
            None, None, seed, js=_NEW_SEED
        )
    steps = gr.Slider(1, cfg.limits.steps, cfg.steps, step=1, label="Steps")
    with gr.Column(visible=cfg.controlnet is not None, elem_classes="subject"):
        gr.Markdown("### Control image")
        control = control_component(cfg.limits)
        wrong = gr.HTML(elem_id="control-wrong", apply_default_css=False)
        control_scale = gr.Slider(0, 2, 1, step=0.05, label="Scale of the control image")
    control.upload(acts.upload_control, None, [control, wrong], concurrency_limit=None, **_QUIET)
    with gr.Accordion("More", open=False):
        negative = gr.Textbox(label="Negative prompt", max_length=most)
        # Gradio refuses whatever lies outside of a slider's ends, the default too
        ends = min(1, cfg.guidance), max(20, cfg.guidance)
        guidance = gr.Slider(*ends, cfg.guidance, step=0.1, label="Guidance")
        rescale = gr.Slider(0, 1, cfg.guidance_rescale, step=0.05, label="Guidance rescale")
        with gr.Row():
            width, height = (
                gr.Number(0, label=side, info="0 = the model's own", precision=0, min_width=120)
                for side in ("Width", "Height")
            )
    return [
        prompt, negative, seed, steps, guidance, rescale, width, height, control, control_scale
    ]  # fmt: skip


class _Subjects:
    """The subjects' widgets: all are made at once, and the first is shown."""

    def __init__(self, cfg: ServeConfig, acts: Acts) -> None:
        self._acts = acts
        self.inputs: list[Any] = []
        self._groups: list[Any] = []
        self._removers: list[Any] = []
        for number in range(1, cfg.limits.subjects + 1):
            self._add(number, cfg)
        self._more = gr.Button("Add a subject", elem_id="add", visible=cfg.limits.subjects > 1)
        self._count = gr.State(1)
        self._more.click(
            self._one_more, self._count, [self._count, self._more, *self._groups], **_QUIET
        )
        for index, button in enumerate(self._removers):
            button.click(
                partial(self._remove, index), [self._count, *self.inputs], self.outputs, **_QUIET
            )

    @property
    def outputs(self) -> list[Any]:
        """What is set when whole subjects come or go."""
        return [self._count, self._more, *self._groups, *self.inputs]

    def _add(self, number: int, cfg: ServeConfig) -> None:
        with gr.Column(
            visible=number == 1, elem_id=f"subject-{number}", elem_classes="subject"
        ) as group:
            with gr.Row(elem_classes="heading"):
                gr.Markdown(f"### Subject {number}")
                remover = gr.Button(
                    f"Remove subject {number}", size="sm", scale=0, min_width=150,
                    elem_id=f"remove-{number}",
                )  # fmt: skip
            with gr.Row(elem_classes="inside"):
                with gr.Column(min_width=120):
                    card = card_component(number, cfg.limits)
                with gr.Column(min_width=120):
                    look = gr.HTML(
                        page_shows.waiting(), elem_id=f"look-{number}", apply_default_css=False
                    )
            with gr.Row(elem_classes="inside"):
                scale = gr.Slider(
                    0, 1.5, 1, step=0.05, label=f"Scale of subject {number}", min_width=170
                )
                choice = gr.Dropdown(
                    [*REGIONS, FOUR_NUMBERS], value="everywhere", min_width=170, filterable=False,
                    label=f"Where subject {number} may act",
                )  # fmt: skip
            edges = gr.Textbox(
                label=f"Region of subject {number}: left,top,right,bottom from 0 to 1",
                placeholder="0,0,0.5,1", visible=False,
            )  # fmt: skip
        choice.change(
            lambda chosen: gr.update(visible=chosen == FOUR_NUMBERS), choice, edges,
            **_QUIET,
        )  # fmt: skip
        card.upload(self._acts.upload, None, [card, look], concurrency_limit=None, **_QUIET)
        card.look(  # type: ignore[operator]
            self._acts.look, card, look,
            concurrency_limit=None, trigger_mode="always_last", **_QUIET,
        )  # fmt: skip
        self._groups.append(group)
        self._removers.append(remover)
        self.inputs += [card, scale, choice, edges]

    def _one_more(self, count: int) -> list[Any]:
        return self._show(min(count + 1, len(self._groups)))

    def _show(self, count: int) -> list[Any]:
        groups = [gr.update(visible=number < count) for number in range(len(self._groups))]
        return [count, gr.update(visible=count < len(self._groups)), *groups]

    def _remove(self, index: int, count: int, *values: Any) -> list[Any]:
        """Those after it move up; the last place is cleared, and hidden unless it is the only."""
        first = index * PER_SUBJECT
        kept = [*values[:first], *values[first + PER_SUBJECT :], *_EMPTY]
        return [*self._show(max(count - 1, 1)), *kept]

    async def choose(self, event: gr.EventData) -> list[Any]:
        """An example into the widgets, and what was in them out."""
        example = await self._acts.example(event)
        values: list[Any] = []
        for number in range(len(self._groups)):
            if number < len(example.subjects):
                chosen = example.subjects[number]
                values += [chosen.card.write(), 1, chosen.region, ""]
            else:
                values += _EMPTY
        return [*self._show(len(example.subjects)), *values, example.prompt]


def _theme() -> gr.themes.Base:
    """Gradio's own, with the fonts of the machine that looks at it."""
    return gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )

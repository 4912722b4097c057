"""The page itself: what a visitor sees and moves. Needs gradio (``pip install 'dyrate-kernels[demo]'``); loads nothing from elsewhere."""

from __future__ import annotations

import difflib
import html
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from dyrate_kernels import plots, shapes
from dyrate_kernels.demo.engine import Engine, Side, State, Wish
from dyrate_kernels.pictures import UnreadableError, read_picture
from dyrate_kernels.specs import RETENTIONS
from dyrate_kernels.units import bytes_text

TITLE = "Visual tokens, dropped while the model answers"
INTRO = (
    "Left: the model reads **every visual token** in each step. Right: the same model drops those it no longer needs. "
    "Below: the patches that the next word was read from; greyed ones were dropped."
)
QUESTION = "Describe the picture."
FONTS = ["system-ui", "sans-serif"]  # gradio's own come from Google
FRAMES = 20  # of the first comparison: 2,880 visual tokens on the bundled model, where the visual tokens are most of what a step reads
LEARNED_ONE = (
    "The bundled model learned single pictures: with more frames its answers are worse, pruned or not, and what there is to see is the "
    "work. With one frame it answers well, and 144 visual tokens are too few to gain by."
)
RECORD = (
    "**Measured on real shapes** (H200, LLaVA-NeXT-7B, 32 sequences of 2,880 visual tokens, 12.5 % kept, `evict`): first token 0.67 s "
    "for 2.43 s, each further one 8.8 ms for 17.3 ms. LLaVA-1.5-7B, one sequence of 576: 4.32 ms for 4.41 ms, next to nothing. "
    "(`bench/results/2026-11-27-h200`; `dyrate doctor` says it of your model.)"
)
CSS = """
.answer textarea { font-size: 1.05rem; }
#words { overflow-wrap: anywhere; }
#figures th, #figures td { overflow-wrap: normal; word-break: normal; }
@media (max-width: 640px) { #figures th, #figures td { padding: 4px 6px; } }
#words del { background: #f7d4c4; color: #7a2d00; } #words ins { background: #cfe8dc; color: #00513a; text-decoration: none; }
#kept img { image-rendering: pixelated; }
footer { display: none !important; }
"""


def build(engine: Engine, at_once: int = 2) -> gr.Blocks:
    """The page.

    Args:
        at_once: comparisons that are at work at a time; further visitors wait, and see that they do.
    """
    warnings.filterwarnings("ignore", message="nothing was dropped")
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"## {TITLE}\n{INTRO}")
        shown: Any = gr.State(None)  # the picture and what was kept, of this visitor's last comparison
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300):
                examples = _examples()
                picture = gr.Image(
                    examples[0][0], type="filepath", label="Picture", sources=["upload", "clipboard"], height=260, elem_id="picture"
                )
                gr.Examples(examples, [picture], label="Drawn scenes, which the bundled model knows", elem_id="examples")
                question = gr.Textbox(QUESTION, label="Question", max_lines=3, elem_id="question")
                ask = gr.Button("Compare", variant="primary", elem_id="ask")
                stop = gr.Button("Stop", elem_id="stop")
                frames = gr.Radio(
                    [1, 8, FRAMES], value=FRAMES, label="Frames", elem_id="frames",
                    info="how often the model is shown the picture, as a video that stands still",
                )  # fmt: skip
                policy = gr.Dropdown(
                    engine.methods(), value="dyrate", label="Policy", info="which tokens are dropped, and when", elem_id="policy"
                )
                strength = gr.Slider(
                    0, 1, 0.5, step=0.05, label="How much to prune", info="0: as little as the policy can, 1: as much", elem_id="strength"
                )
                retention = gr.Radio(
                    [*RETENTIONS], value="pool", label="Retention", elem_id="retention",
                    info="recoverable: a dropped token may come back; evict: it is gone, and memory with it; "
                    "pool: a quarter of the picture stays, and may come back",
                )  # fmt: skip
                names = engine.reducers()
                reducer = gr.Dropdown(
                    ["none", *names], value="none", label="Before the language model", visible=bool(names), elem_id="reducer",
                    info="fewer visual tokens from the start",
                )  # fmt: skip
                length = gr.Slider(8, 256, 96, step=8, label="Longest answer, tokens", elem_id="length")
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    plain = gr.Textbox(
                        label="Every visual token", lines=5, min_width=280, interactive=False, elem_id="plain", elem_classes="answer"
                    )
                    pruned = gr.Textbox(label="Pruned", lines=5, min_width=280, interactive=False, elem_id="pruned", elem_classes="answer")
                figures = gr.Markdown("Figures appear with the answers.", elem_id="figures")
                words = gr.HTML("", elem_id="words")
                kept = gr.Image(label="What the pruned layers read", interactive=False, height=340, elem_id="kept", buttons=[])
                step = gr.Slider(0, 1, 0, step=1, label="Step of the answer", interactive=False, elem_id="step")
                gr.Markdown(f"{RECORD}\n\n{LEARNED_ONE if engine.bundled else ''}", elem_id="record")

        def compare(file: Any, *wish: Any) -> Iterator[Any]:
            yield from _compare(engine, file, *wish)

        run = ask.click(
            compare, [picture, question, policy, strength, retention, reducer, length, frames],
            [plain, pruned, figures, kept, step, shown, words],
            show_progress="minimal", concurrency_limit=at_once, concurrency_id="compare", api_name="compare",
        )  # fmt: skip
        stop.click(None, cancels=[run])
        policy.input(engine.suited, [policy, retention], retention, show_progress="hidden", api_visibility="private")
        step.input(_at_step, [step, shown], kept, show_progress="hidden", api_visibility="private")
    return page


def launch(engine: Engine, host: str, port: int | None, at_once: int = 2, **options: Any) -> Any:
    """Serves the page until it is interrupted (or in the background, with ``prevent_thread_lock=True``)."""
    page = build(engine, at_once)
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    page.queue(default_concurrency_limit=8)
    return page, page.launch(
        server_name=host, server_port=port, share=False, quiet=True, show_error=True, theme=theme, css=CSS, ssr_mode=False, footer_links=[],
        **options,
    )  # fmt: skip


def _compare(
    engine: Engine, file: str | None, question: str, policy: str, strength: float, retention: str, reducer: str, length: float,
    frames: float = 1,
) -> Iterator[Any]:  # fmt: skip
    reducers = None if reducer == "none" else reducer
    wish = Wish(question or "", policy, float(strength), retention, reducers, int(length), int(frames))
    try:
        picture = None if file is None else read_picture(file)
        states = engine.compare(picture, wish)
        for state in states:
            yield _show(state, picture if wish.frames == 1 else [picture] * wish.frames)
    except UnreadableError as error:
        raise gr.Error(f"This file cannot be shown: {error}", print_exception=False) from None
    except (ValueError, TypeError, RuntimeError) as error:  # what does not fit together, in the words of the package
        raise gr.Error(str(error), print_exception=False) from None


def _show(state: State, picture: Any) -> tuple[Any, ...]:
    last = len(state.kept) - 1
    data = {"picture": picture, "kept": state.kept, "total": state.visual_tokens}
    seen = _overlay(data, last) if state.kept else gr.skip()
    slider = gr.Slider(0, max(last, 1), last, interactive=state.pruned.done and last > 0) if state.kept else gr.skip()
    return state.plain.text, state.pruned.text, _figures(state), seen, slider, data, _aligned(state)


def _aligned(state: State) -> str:
    """Both answers as one text, where both are there: what the unpruned model alone says is struck out, what the pruned one alone says is
    marked.
    """
    if not (state.plain.done and state.pruned.done) or state.plain.text == state.pruned.text:
        return ""
    left, right = state.plain.text.split(), state.pruned.text.split()
    parts = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(html.escape(" ".join(left[a:b])))
            continue
        parts += [f"<del>{html.escape(' '.join(left[a:b]))}</del>"] * (b > a) + [f"<ins>{html.escape(' '.join(right[c:d]))}</ins>"] * (
            d > c
        )
    return f"<p><b>Differences</b>: <del>every visual token</del> <ins>pruned</ins></p><p>{' '.join(parts)}</p>"


def _overlay(data: dict[str, Any], step: int) -> Any:
    """The picture with what was dropped in a step greyed, uint8."""
    image = plots.kept_picture(data["picture"], data["kept"][step], data["total"])
    if image is None:  # patches of no square grid: the picture as it is, the figures tell the rest
        picture = data["picture"]
        return np.asarray(picture[0] if isinstance(picture, list) else picture)
    return (image * 255).astype(np.uint8)


def _at_step(step: float, data: dict[str, Any] | None) -> Any:
    if not data or not data["kept"]:
        return gr.skip()
    return _overlay(data, min(int(step), len(data["kept"]) - 1))


def _figures(state: State) -> str:
    def per_token(side: Side) -> str:
        return "" if side.per_token is None else f"{1e3 * side.per_token:.1f} ms"

    total = state.visual_tokens
    lines = ["| | every visual token | pruned |", "| --- | --- | --- |"]
    lines.append(f"| tokens | {state.plain.tokens} | {state.pruned.tokens} |")
    lines.append(f"| time per token | {per_token(state.plain)} | {per_token(state.pruned)} |")
    lines.append(f"| first token | {1e3 * state.plain.first:.0f} ms | {1e3 * state.pruned.first:.0f} ms |")
    if state.kept:
        counts = [len(step) for step in state.kept]
        if state.bytes_per_token is not None:
            lines.append("| bytes per token | " + " | ".join(map(bytes_text, state.bytes_per_token)) + " |")
        lines.append(f"| visual tokens read in the last step | {total} | {counts[-1]} |")
        lines.append(f"| visual rows read, all layers and steps | 100 % | {100 * (state.read or 0):.1f} % |")
        if state.bytes_read is not None:
            lines.append(f"| bytes read by the steps, weights included | 100 % | {100 * state.bytes_read:.1f} % |")
    words = []
    if state.plain.done and state.pruned.done and state.plain.per_token and state.pruned.per_token:
        ratio = state.plain.per_token / state.pruned.per_token
        faster = f"Pruned was **{ratio:.2f}x as fast** a token."
        slower = f"Pruned was **slower: {ratio:.2f}x** as fast a token. Choosing cost more than it saved here."
        words.append(faster if ratio >= 1 else slower)
        words.append("The answers are the same." if state.plain.text == state.pruned.text else "The answers differ.")
    if state.company > 1:
        words.append(f"Up to {state.company} visitors were at work at a time, so times say little.")
    return "\n".join([*lines, "", " ".join(words)])


def _examples() -> list[list[str]]:
    folder = Path(tempfile.mkdtemp(prefix="dyrate-examples-"))
    found = []
    for number, seed in enumerate((3, 11, 42), 1):
        file = folder / f"scene_{number}.png"
        shapes.draw(shapes.make_scene(seed)).save(file)
        found.append([str(file)])
    return found

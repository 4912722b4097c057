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
    "One model answers twice, token by token: with **every visual token** in each step, and **pruned**, without those that it no longer "
    "needs. Under the answers: the patches that the next word was read from; greyed ones were dropped."
)
QUESTION = "Describe the picture."
FONTS = ["system-ui", "sans-serif"]  # gradio's own come from Google
RETENTION = "pool"  # of the first comparison
FRAMES = 20  # of the first comparison: 2,880 visual tokens on the bundled model, where the visual tokens are most of what a step reads
LEARNED_ONE = (
    "The bundled model learned single pictures: with more frames its answers are worse, pruned or not, and what there is to see is the "
    "work. With one frame it answers well, and 144 visual tokens are too few to gain by."
)
READING = "Reading the prompt: once with every visual token, once pruned. On a CPU, {frames} frames take some seconds."
STREAMING = "Both answers are being written, token by token in turns."
NOW = "The pruned one now reads <b>{kept} of {total}</b> visual tokens and {less} for {more} a token."
RECORD = (
    "**Measured on real shapes** (H200, LLaVA-NeXT-7B, 32 sequences of 2,880 visual tokens, 12.5 % kept, `evict`): first token 0.67 s "
    "for 2.43 s, each further one 8.8 ms for 17.3 ms. LLaVA-1.5-7B, one sequence of 576: 4.32 ms for 4.41 ms, next to nothing. "
    "(`bench/results/2026-11-27-h200`; `dyrate doctor` says it of your model.)"
)
CSS = """
#panes { display: grid; grid-template-columns: minmax(300px, 1fr) minmax(0, 2fr); grid-template-rows: auto 1fr; align-items: start;
  grid-template-areas: "wish answers" "settings answers"; }
#wish { grid-area: wish; } #answers { grid-area: answers; scroll-margin-top: 8px; } #settings { grid-area: settings; }
#wish, #answers, #settings { width: 100%; min-width: 0 !important; }
.answer textarea { font-size: 1.05rem; }
#words { overflow-wrap: anywhere; padding: 0; } #words p { margin: 0 0 .4rem; }
#words del { background: #f7d4c4; color: #7a2d00; } #words ins { background: #cfe8dc; color: #00513a; text-decoration: none; }
#figures table, #figures tr { border: 0; } #figures table { border-collapse: collapse; margin: .4rem 0; }
#figures th, #figures td { overflow-wrap: normal; word-break: normal; border: 0; border-bottom: 1px solid var(--border-color-primary);
  padding: 4px 14px 4px 0; }
#figures th + th, #figures td + td { text-align: right; white-space: nowrap; }
#picture img { width: 100%; height: 100%; object-fit: contain; } #picture img, #kept img { image-rendering: pixelated; }
#kept img { box-sizing: border-box; padding-top: 28px; }
@media (max-width: 760px) {
  #panes { grid-template-columns: minmax(0, 1fr); grid-template-rows: none; grid-template-areas: "wish" "answers" "settings"; }
  .answer textarea { font-size: .95rem; } #figures th, #figures td { padding-right: 8px; }
  #figures td:first-child { white-space: normal; }
}
footer { display: none !important; }
"""
TO_ANSWERS = """(...wish) => { const answers = document.querySelector('#answers');
  const top = answers.getBoundingClientRect().top;
  if (top < 0 || top > 0.4 * window.innerHeight) answers.scrollIntoView({behavior: 'smooth', block: 'start'});
  return wish; }"""  # runs before the comparison, and hands on what it was given


def build(engine: Engine, at_once: int = 2) -> gr.Blocks:
    """The page.

    Args:
        at_once: comparisons that are at work at a time; further visitors wait, and see that they do.
    """
    warnings.filterwarnings("ignore", message="nothing was dropped")
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"## {TITLE}\n{INTRO}")
        shown: Any = gr.State(None)  # the picture and what was kept, of this visitor's last comparison
        with gr.Row(equal_height=False, elem_id="panes"):
            with gr.Column(elem_id="wish"):
                examples = _examples()
                picture = gr.Image(
                    examples[0][0], type="filepath", label="Picture", sources=["upload", "clipboard"], height=200, elem_id="picture"
                )
                gr.Examples(examples, [picture], label="Drawn scenes, which the bundled model knows", elem_id="examples")
                question = gr.Textbox(QUESTION, label="Question", max_lines=3, elem_id="question")
                with gr.Row():
                    ask = gr.Button("Compare", variant="primary", elem_id="ask", scale=3, min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=60)
            with gr.Column(elem_id="answers"):
                with gr.Row():
                    plain = gr.Textbox(
                        label="Every visual token", lines=4, min_width=280, interactive=False, elem_id="plain", elem_classes="answer"
                    )
                    pruned = gr.Textbox(label="Pruned", lines=4, min_width=280, interactive=False, elem_id="pruned", elem_classes="answer")
                words = gr.HTML(_paragraphs(_before(engine)), elem_id="words", padding=False)
                kept = gr.Image(label="What the pruned layers read", interactive=False, height=300, elem_id="kept", buttons=[])
                step = gr.Slider(0, 1, 0, step=1, label="Step of the answer", interactive=False, elem_id="step")
                figures = gr.Markdown("", elem_id="figures")
                gr.Markdown(RECORD, elem_id="record")
            with gr.Column(elem_id="settings"):
                frames = gr.Radio(
                    [1, 8, FRAMES], value=first_frames(engine), label="Frames", elem_id="frames",
                    info="how often the model is shown the picture, as a video that stands still",
                )  # fmt: skip
                policy = gr.Dropdown(
                    engine.methods(), value="dyrate", label="Policy", info="which tokens are dropped, and when", elem_id="policy"
                )
                strength = gr.Slider(
                    0, 1, 0.5, step=0.05, label="How much to prune", info="0: as little as the policy can, 1: as much", elem_id="strength"
                )
                retention = gr.Radio(
                    [*RETENTIONS], value=RETENTION, label="Retention", elem_id="retention",
                    info="recoverable: a dropped token may come back; evict: it is gone, and memory with it; "
                    "pool: a quarter of the picture stays, and may come back",
                )  # fmt: skip
                names = engine.reducers()
                reducer = gr.Dropdown(
                    ["none", *names], value="none", label="Before the language model", visible=bool(names), elem_id="reducer",
                    info="fewer visual tokens from the start",
                )  # fmt: skip
                length = gr.Slider(8, 256, 96, step=8, label="Longest answer, tokens", elem_id="length")

        def compare(file: Any, *wish: Any) -> Iterator[Any]:
            yield from _compare(engine, file, *wish)

        run = ask.click(
            compare, [picture, question, policy, strength, retention, reducer, length, frames],
            [plain, pruned, figures, kept, step, shown, words],
            show_progress="minimal", concurrency_limit=at_once, concurrency_id="compare", api_name="compare",
            js=TO_ANSWERS,
        )  # fmt: skip
        stopped = stop.click(None, cancels=[run])
        stopped.then(lambda: _paragraphs("Stopped."), None, words, show_progress="hidden", api_visibility="private")  # after its last state
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
    skip = gr.skip()
    yield "", "", "", skip, skip, skip, _paragraphs(READING.format(frames=wish.frames) if wish.frames > 1 else READING.split(" On ")[0])
    try:
        picture = None if file is None else read_picture(file)
        states = engine.compare(picture, wish)
        for state in states:
            yield _show(state, picture if wish.frames == 1 else [picture] * wish.frames, engine.bundled and wish.frames > 1)
    except (ValueError, TypeError, RuntimeError) as error:  # what does not fit together, in the words of the package
        yield *[skip] * 6, _paragraphs(_before(engine))
        what = "This file cannot be shown: " if isinstance(error, UnreadableError) else ""
        raise gr.Error(f"{what}{error}", print_exception=False) from None


def first_frames(engine: Engine) -> int:
    """Frames as the page opens: one for a real model, which has visual tokens enough to see the work."""
    return FRAMES if engine.bundled else 1


def _before(engine: Engine) -> str:
    shown = f"<b>Compare</b> shows the picture {FRAMES} times, as a video that stands still: 2,880 visual tokens. {LEARNED_ONE}"
    return shown if engine.bundled else "<b>Compare</b> asks the model twice; the settings say how the second time is pruned."


def _paragraphs(*texts: str) -> str:
    return "".join(f"<p>{text}</p>" for text in texts if text)


def _show(state: State, picture: Any, worse: bool = False) -> tuple[Any, ...]:
    """Values of the outputs; ``worse``: the answers are those of a model that learned something else, which is said behind them."""
    last = len(state.kept) - 1
    data = {"picture": picture, "kept": state.kept, "total": state.visual_tokens}
    seen = _overlay(data, last) if state.kept else gr.skip()
    slider = gr.Slider(0, max(last, 1), last, interactive=state.pruned.done and last > 0) if state.kept else gr.skip()
    words = _paragraphs(_verdict(state)) + _aligned(state) + _paragraphs(LEARNED_ONE if worse else "")
    done = state.plain.done and state.pruned.done
    return state.plain.text, state.pruned.text, _figures(state), seen, slider, data, words if done else _paragraphs(_now(state))


def _now(state: State) -> str:
    """Says what is read while the answers are written."""
    if not state.kept or state.bytes_per_token is None:
        return STREAMING
    more, less = map(bytes_text, state.bytes_per_token)
    return f"{STREAMING} {NOW.format(kept=len(state.kept[-1]), total=state.visual_tokens, less=less, more=more)}"


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
    return f"<p><b>Differences</b>: <del>every visual token</del> <ins>pruned</ins></p><p class='aligned'>{' '.join(parts)}</p>"


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
    lines = ["| | every token | pruned |", "| --- | --- | --- |", f"| policy | none | {state.method} |"]
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
    return "\n".join(lines)


def _verdict(state: State) -> str:
    """Says first what pruning bought, and whether the answers are the same."""
    plain, pruned = state.plain, state.pruned
    words = []
    if plain.per_token and pruned.per_token:
        ratio, first = plain.per_token / pruned.per_token, plain.first / pruned.first
        slower = " Choosing cost more than it saved here."
        words.append(
            f"Pruned was <b>{'' if ratio >= 1 else 'slower: '}{ratio:.2f}x as fast</b> a token ({first:.2f}x to the first one)"
            + (f" and read {100 * state.bytes_read:.0f} % of the bytes." if state.bytes_read is not None else ".")
            + (slower if ratio < 1 else "")
        )
    words.append("The answers are the same." if plain.text == pruned.text else "The answers differ.")
    if state.company > 1:
        words.append(f"Up to {state.company} visitors were at work at a time, so times say little.")
    return " ".join(words)


def _examples() -> list[list[str]]:
    folder = Path(tempfile.mkdtemp(prefix="dyrate-examples-"))
    found = []
    for number, seed in enumerate((3, 11, 42), 1):
        file = folder / f"scene_{number}.png"
        shapes.draw(shapes.make_scene(seed)).save(file)
        found.append([str(file)])
    return found

"""``dyrate demo``: a page in the browser that shows unpruned and pruned answers side by side, and which patches were read."""

from __future__ import annotations

import argparse
import importlib.util
import os
from typing import Any

from dyrate_kernels.cli import common, contenders


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("demo", help="a page that compares answers side by side", description=__doc__)
    common.add_common(parser)
    common.add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone; 0.0.0.0 for others")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--at-once", type=common.positive, default=2, metavar="N", help="visitors served at a time, others wait; default: 2"
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Serves the page until it is stopped."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("dyrate demo needs gradio: pip install 'dyrate-kernels[demo]'")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_OFFLINE", "1") if given.model is None else None
    from dyrate_kernels import policies
    from dyrate_kernels.demo import app
    from dyrate_kernels.demo.engine import Engine

    engine = Engine(*common.load_model(given))
    settings = contenders.settings(engine.model.config, policies.get("dyrate"), app.RETENTION, "auto", engine.model.device)
    page, (_, url, _) = app.launch(engine, given.host, given.port, given.at_once, prevent_thread_lock=True)
    if given.json:
        common.print_json({"url": url, "settings": settings})
    else:
        common.say("page", f"{url} (Ctrl+C ends it)")
        common.say("at first", f"{contenders.words(settings)}; the picture {app.first_frames(engine)} times")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
    return 0

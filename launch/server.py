"""A server of our own in a child process, and questions asked through the `openai` client: for chat and demo."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import APIError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class Address:
    """Where an OpenAI-compatible server listens, and its key."""

    url: str
    key: str


@contextlib.contextmanager
def local_server(model: Path, engine: str) -> Iterator[Address]:
    """Run `shipyard serve` on a free port of 127.0.0.1 for as long as the block lasts. Raises ValueError, with the
    server's own last line, when it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_urlsafe(24)
    command = [
        sys.executable,
        "-m",
        "shipyard.launch.cli",
        "serve",
        str(model),
        "--engine",
        engine,
        "--port",
        str(port),
    ]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"SHIPYARD_API_KEY": key}
        )
        try:
            if not _comes_up(child, f"http://127.0.0.1:{port}/health"):
                log.seek(0)
                lines = [line.strip() for line in log.read().splitlines() if line.strip()]
                reason = lines[-1].removeprefix("shipyard: error: ") if lines else f"exit code {child.poll()}"
                raise ValueError(f"serve: {engine} did not come up with {model}: {reason}")
            yield Address(f"http://127.0.0.1:{port}/v1", key)
        finally:
            child.terminate()
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _comes_up(child: subprocess.Popen[bytes], health: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(health, timeout=2).status_code == 200:
                return True
        time.sleep(0.2)
    return False


def connect(address: Address) -> tuple[OpenAI, str]:
    """Return a client and the name of the first model offered. Raises ValueError if the server does not answer."""
    client = OpenAI(base_url=address.url, api_key=address.key, timeout=600, max_retries=0)
    try:
        return client, client.models.list().data[0].id
    except (APIError, IndexError) as error:
        raise ValueError(
            f"server: {address.url} offers no model ({error}); check the URL and $SHIPYARD_API_KEY"
        ) from None


def stream(
    client: OpenAI, model: str, messages: list[ChatCompletionMessageParam], max_tokens: int = 512
) -> Iterator[str]:
    """Yield a reply's text as it is generated, greedily. Raises ValueError for what the server refuses."""
    try:
        chunks = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
        )
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content
    except APIError as error:
        raise ValueError(f"server: {error.message}") from None

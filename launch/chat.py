"""`shipyard chat`: a conversation in the terminal, with a server somewhere or with one of our own."""

import contextlib
import os
import sys
from pathlib import Path

from openai.types.chat import ChatCompletionMessageParam

from .server import Address, connect, local_server, stream
from .tables import spinner


def talk(model: Path | str, engine: str, message: str | None) -> None:
    """Talk to a URL (OpenAI-compatible, key in $SHIPYARD_API_KEY) or to a model, served for as long as this lasts.

    With `message`, ask that one thing, print the reply and return.
    """
    if isinstance(model, str):
        url = model.rstrip("/")
        url = url if url.endswith("/v1") else f"{url}/v1"
        _converse(Address(url, os.environ.get("SHIPYARD_API_KEY", "none")), message)
        return
    with contextlib.ExitStack() as stack:
        with spinner(f"loading {model}"):
            address = stack.enter_context(local_server(model, engine))
        _converse(address, message)


def _converse(address: Address, message: str | None) -> None:
    client, name = connect(address)
    if message is not None:
        for piece in stream(client, name, [{"role": "user", "content": message}]):
            print(piece, end="", flush=True)
        print()
        return
    print(f"{name} at {address.url}; Ctrl-D ends, /new starts over")
    messages: list[ChatCompletionMessageParam] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print()
            return
        if text == "/new":
            messages = []
        elif text:
            messages.append({"role": "user", "content": text})
            pieces = []
            for piece in stream(client, name, messages):
                pieces.append(piece)
                print(piece, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": "".join(pieces)})

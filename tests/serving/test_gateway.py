"""The front door, over real sockets: keys, bounds, slow and vanished clients, and an orderly end."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import openai
import pytest

SERVER = Path(__file__).with_name("metronome_server.py")
FAST = {"header_timeout_s": 1.0, "body_timeout_s": 1.0, "write_timeout_s": 1.0, "generations": 2, "notice_s": 0.5}
KEY = {"Authorization": "Bearer secret"}
CHAT = {"model": "metronome", "messages": [{"role": "user", "content": "go"}], "max_tokens": 2}


@contextmanager
def running(limits: dict[str, float]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, str(SERVER), json.dumps(limits)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving metronome with metronome at http://127.0.0.1:")
        yield process, int(line.rsplit(":", 1)[1].split("/")[0])
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(FAST) as (_, port):
        yield port


@pytest.fixture
def client(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=KEY, timeout=15) as client:
        yield client


def open_socket(port: int, head: bytes) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port), timeout=15)
    raw.sendall(head)
    return raw


def post_head(length: str) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n{length}\r\n\r\n"
    return head.encode()


def read_all(raw: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionResetError):
        while chunk := raw.recv(65536):
            data += chunk
    return data


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/docs", "/openapi.json", "/x"])
@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer wrong", "Basic secret", "Bearer secretx"])
def test_no_route_without_the_key(port: int, path: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": key}
    for method in ("GET", "POST", "DELETE"):
        answer = httpx.request(method, f"http://127.0.0.1:{port}{path}", headers=headers)
        assert answer.status_code == 401, (method, path)
        assert answer.json()["error"]["type"] == "authentication_error"


def test_health_needs_none_and_the_key_opens(port: int, client: httpx.Client) -> None:
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == "metronome"
    assert client.get("/v1/models/metronome").status_code == 200
    assert client.get("/docs").status_code == 404


def test_openai_client_streams_and_does_not(port: int) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
    whole = client.chat.completions.create(**CHAT)
    assert whole.choices[0].message.content == "tick0 tick1 "
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 2)
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "tick0 tick1 "
    assert (chunks[0].choices[0].delta.role, chunks[-2].choices[0].finish_reason) == ("assistant", "length")
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 3)
    text = client.completions.create(model="metronome", prompt="go", max_tokens=1)
    assert text.choices[0].text == "tick0 "
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**CHAT, "model": "gpt-4"})
    assert caught.value.code == "model_not_found"


BAD = [
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"seed": -1}, "seed"),
    ({"n": 2}, "n: 2, only 1"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages.0.content"),
    ({"tools": []}, "tools"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_every_field_is_bounded(client: httpx.Client, change: dict, named: str) -> None:
    answer = client.post("/v1/chat/completions", content=json.dumps({**CHAT, **change}))
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 200_000, b'{"model": "\xff"}', b"null", b'{"a":' * 50_000])
def test_what_is_not_a_request_is_400(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v1/chat/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_engine_refusals_keep_their_status(client: httpx.Client) -> None:
    for stream in (False, True):
        body = {"model": "metronome", "prompt": "refuse", "stream": stream}
        assert client.post("/v1/completions", json=body).status_code == 400


def test_a_broken_stream_does_not_claim_to_be_done(client: httpx.Client) -> None:
    body = {"model": "metronome", "prompt": "break", "max_tokens": 9, "stream": True}
    text = client.post("/v1/completions", json=body).text
    assert "tick1" in text
    assert "the spring broke" in text
    assert "[DONE]" not in text
    body["stream"] = False
    assert client.post("/v1/completions", json=body).status_code == 502


def test_a_large_body_is_413_before_it_is_sent_and_while_it_streams(port: int, client: httpx.Client) -> None:
    with open_socket(port, post_head(f"Content-Length: {50 << 20}")) as raw:
        assert b" 413 " in read_all(raw).split(b"\r\n")[0]
    with open_socket(port, post_head("Transfer-Encoding: chunked")) as raw:
        sent, chunk = 0, b"10000\r\n" + b"a" * 65536 + b"\r\n"
        with suppress(OSError):
            while sent < 8 << 20:
                raw.sendall(chunk)
                sent += 65536
        assert sent < 8 << 20
    assert client.get("/health").status_code == 200


def test_slow_clients_are_cut(port: int) -> None:
    started = time.monotonic()
    silent = open_socket(port, b"")
    headers = open_socket(port, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    body = open_socket(port, post_head("Content-Length: 100") + b'{"mod')
    second = open_socket(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    time.sleep(0.3)
    second.sendall(b"GET /health HTTP/1.1\r\nHo")  # a kept connection, slow at its second request
    assert read_all(silent) == b""
    assert read_all(headers) == b""
    assert b" 408 " in read_all(body).split(b"\r\n")[0]
    assert b" 200 " in read_all(second).split(b"\r\n")[0]
    assert time.monotonic() - started < 5


def generate(port: int, prompt: str, ticks: int) -> socket.socket:
    """Start a streaming generation on a raw socket."""
    body = json.dumps({"model": "metronome", "messages": [{"role": "user", "content": prompt}], "max_tokens": ticks})
    content = (body[:-1] + ', "stream": true}').encode()
    raw = open_socket(port, post_head(f"Content-Length: {len(content)}") + content)
    assert raw.recv(15) == b"HTTP/1.1 200 OK"
    return raw


def wait_until_free(client: httpx.Client, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while (answer := client.post("/v1/chat/completions", json=CHAT)).status_code == 429:
        assert answer.headers["retry-after"] == "1"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer.status_code == 200


def test_too_many_generations_are_429_and_a_vanished_client_frees_its_slot(port: int, client: httpx.Client) -> None:
    first, second = generate(port, "go", 600), generate(port, "go", 600)
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert client.get("/v1/models").status_code == 200
    first.close()
    wait_until_free(client, 2)
    second.close()
    wait_until_free(client, 2)


def test_a_client_that_does_not_read_frees_its_slot(port: int, client: httpx.Client) -> None:
    held = [generate(port, "flood", 1_000_000) for _ in range(2)]
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 429
    wait_until_free(client, 8)
    for raw in held:
        raw.close()


def test_sigterm_says_503_finishes_the_stream_and_exits_0() -> None:
    with running({**FAST, "notice_s": 0.7}) as (process, port):
        raw = generate(port, "go", 50)  # 2.5 s
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(read_all(raw)))
        reader.start()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
        asked = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", headers=KEY, json=CHAT)
        assert asked.status_code == 200  # still welcome until the load balancer has noticed
        time.sleep(0.8)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")
        reader.join(10)
        assert b"tick49" in received[0]
        assert b"[DONE]" in received[0]
        assert process.wait(5) == 0


def test_websockets_get_no_further(port: int) -> None:
    upgrade = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with open_socket(port, upgrade) as raw:
        assert b" 401 " in read_all(raw).split(b"\r\n")[0]

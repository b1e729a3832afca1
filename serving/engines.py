"""Start an engine for a model: llama.cpp, transformers, vLLM or Ollama. All but transformers are child processes that
speak OpenAI's API on 127.0.0.1 behind a key of their own, so that a crash of one cannot take the gateway down."""

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from .llamacpp import LlamaServer, ServerRequest, require_llamacpp
from .stream import Engine, EngineError, Piece, Sampling

ENGINES = ("auto", "llamacpp", "transformers", "vllm", "ollama")
START_TIMEOUT_S = 600
# Reading: a long prompt on a slow machine sends nothing for minutes. Connecting: the child is on this machine.
TIMEOUT = httpx.Timeout(600, connect=5)


class ProxyEngine:
    """An engine behind its own OpenAI-compatible server. `extra` goes into every request's body."""

    def __init__(
        self,
        name: str,
        url: str,
        key: str,
        model: str,
        slots: int,
        extra: dict[str, Any],
        alive: Callable[[], bool],
        stop: Callable[[], None],
    ) -> None:
        self.name, self.slots, self.model, self.extra = name, slots, model, extra
        self.alive, self._stop = alive, stop
        self.client = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT)

    def stop(self) -> None:
        """End the child process."""
        self._stop()

    def chat(self, messages: Sequence[dict[str, str]], sampling: Sampling) -> AsyncIterator[Piece]:
        """Answer a conversation."""
        return self._stream("/v1/chat/completions", {"messages": list(messages)}, sampling)

    def complete(self, prompt: str, sampling: Sampling) -> AsyncIterator[Piece]:
        """Continue a text."""
        return self._stream("/v1/completions", {"prompt": prompt}, sampling)

    async def _stream(self, path: str, body: dict[str, Any], sampling: Sampling) -> AsyncIterator[Piece]:
        body = {
            **body,
            **self.extra,
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if sampling.max_tokens is not None:
            body["max_tokens"] = sampling.max_tokens
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        finish, usage = None, {}
        try:
            async with self.client.stream("POST", path, json=body) as answer:
                if answer.status_code != 200:
                    raise _refusal(self.name, answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    event = _event(self.name, line)
                    if event is None:
                        continue
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", ())[:1]:
                        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                        if text:
                            yield Piece(text)
                        finish = choice.get("finish_reason") or finish
        except httpx.HTTPError as error:
            raise EngineError(502, f"{self.name} does not answer: {type(error).__name__}") from None
        if finish is None:
            raise EngineError(502, f"{self.name} broke off in the middle of its answer")
        yield Piece("", finish, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


def _refusal(name: str, status: int, body: bytes) -> EngineError:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"status {status}"
    return EngineError(400 if 400 <= status < 500 and status not in (401, 404) else 502, f"{name}: {message[:500]}")


def _event(name: str, line: str) -> dict[str, Any] | None:
    """One server-sent event's JSON; None for what carries none. Raises EngineError for an error sent in the stream."""
    field, _, data = line.partition(":")
    if field not in ("data", "error") or data.strip() in ("", "[DONE]"):
        return None
    event = json.loads(data)
    if field == "error" or "error" in event:
        error = event.get("error", event)
        raise EngineError(502, f"{name}: {error.get('message', error) if isinstance(error, dict) else error}")
    return event


def find_gguf(model: Path) -> Path | None:
    """The GGUF file that `model` is or holds (of several, the smallest); None when there is none."""
    if model.suffix == ".gguf":
        return model
    files = sorted(model.glob("*.gguf"), key=lambda path: path.stat().st_size) if model.is_dir() else []
    return files[0] if files else None


def _hf_directory(model: Path, engine: str) -> Path:
    from .export import model_directory

    if not model.is_dir():
        raise ValueError(f"model: {model} is not a directory; engine {engine} loads a run or a Hugging Face directory")
    return model_directory(model)


def _start_llamacpp(model: Path, context: int, slots: int) -> Engine:
    require_llamacpp()
    gguf, scratch = find_gguf(model), None
    if gguf is None:
        from .gguf import write_gguf

        scratch = tempfile.TemporaryDirectory(prefix="shipyard-serve-")
        gguf = Path(scratch.name) / "model-f16.gguf"
        write_gguf(_hf_directory(model, "llamacpp"), gguf, "f16")
    key = secrets.token_urlsafe(24)
    threads = max(1, len(os.sched_getaffinity(0)))
    server = LlamaServer(ServerRequest(str(gguf), context, slots, threads, key))
    if scratch is not None:
        scratch.cleanup()  # the server has it mapped: the space returns when it ends
    # llama.cpp would sample with top-k 40 and min-p 0.05, and take <think> out of the content, unless told not to.
    extra = {"top_k": 0, "min_p": 0.0, "reasoning_format": "none"}
    return ProxyEngine("llamacpp", server.url, key, "model", slots, extra, server.alive, server.stop)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], url: str, name: str) -> None:
    """Wait until a child's server answers `url`. Raises ValueError when it ends or takes too long instead."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    process.kill()
    raise ValueError(f"engine: {name} did not come up (exit code {process.wait()}); its own lines above say why")


def _stopper(process: subprocess.Popen[bytes]) -> Callable[[], None]:
    def stop() -> None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    return stop


def _start_vllm(model: Path, context: int, slots: int) -> Engine:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("engine: vLLM is not installed; pip install 'shipyard-llm[vllm]'")
    key, port = secrets.token_urlsafe(24), _free_port()
    arguments = ["--model", str(_hf_directory(model, "vllm")), "--served-model-name", "model", "--host", "127.0.0.1"]
    arguments += ["--port", str(port), "--max-model-len", str(context), "--max-num-seqs", str(slots)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, "--shutdown-timeout", "30"]
    process = subprocess.Popen(
        command, env={**os.environ, "VLLM_API_KEY": key}, stdout=sys.stderr, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    _wait(process, url + "/health", "vLLM")
    alive = lambda: process.poll() is None
    return ProxyEngine("vllm", url, key, "model", slots, {}, alive, _stopper(process))


def _start_ollama(model: Path, context: int, slots: int) -> Engine:
    binary = shutil.which("ollama")
    if binary is None:
        raise ValueError(
            "engine: the ollama program is not on PATH; install it from its site, or use --engine llamacpp"
        )
    if not (model / "Modelfile").is_file():
        raise ValueError(f"model: {model} has no Modelfile; make one with shipyard export --to ollama")
    address = f"127.0.0.1:{_free_port()}"
    environment = {**os.environ, "OLLAMA_HOST": address, "OLLAMA_NUM_PARALLEL": str(slots)}
    environment["OLLAMA_CONTEXT_LENGTH"] = str(context)
    process = subprocess.Popen([binary, "serve"], env=environment, stdout=sys.stderr, start_new_session=True)
    url, stop = f"http://{address}", _stopper(process)
    _wait(process, url + "/api/version", "ollama")
    create = [binary, "create", "shipyard", "-f", str(model / "Modelfile")]
    if subprocess.run(create, env=environment, stdout=sys.stderr).returncode != 0:
        stop()
        raise ValueError(f"engine: ollama cannot create a model from {model / 'Modelfile'}; its lines above say why")
    alive = lambda: process.poll() is None
    return ProxyEngine("ollama", url, "ollama", "shipyard", slots, {}, alive, stop)


def _start_transformers(model: Path, context: int, slots: int) -> Engine:
    from .generation import TransformersEngine

    del slots  # one generation at a time
    return TransformersEngine(_hf_directory(model, "transformers"), context)


def choose_engine(model: Path) -> str:
    """What `auto` means: llama.cpp for GGUF; else vLLM on a GPU, llama.cpp, or transformers, as installed."""
    if (importlib.util.find_spec("xllamacpp") is not None) and find_gguf(model) is not None:
        return "llamacpp"
    if importlib.util.find_spec("vllm") is not None and shutil.which("nvidia-smi") is not None:
        return "vllm"
    return "llamacpp" if importlib.util.find_spec("xllamacpp") is not None else "transformers"


def start_engine(model: Path, engine: str = "auto", context: int = 4096, slots: int = 4) -> Engine:
    """Load `model` (a run, a Hugging Face directory, an export or a GGUF file); returns the engine once it can answer.

    `context` is in tokens for each of `slots` concurrent generations. Raises ValueError when the engine is unknown or
    not installed, with the line that installs it, or when it cannot load the model.
    """
    starters = {
        "llamacpp": _start_llamacpp,
        "transformers": _start_transformers,
        "vllm": _start_vllm,
        "ollama": _start_ollama,
    }
    if engine not in ENGINES:
        raise ValueError(f"engine: {engine!r} is not one of {', '.join(ENGINES)}")
    if not model.exists():
        raise ValueError(f"model: {model} does not exist; give a run, a model directory or a GGUF file")
    return starters[choose_engine(model) if engine == "auto" else engine](model, context, slots)

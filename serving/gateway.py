"""The front door: one model behind OpenAI's API, with a key, bounds, and an orderly end.

GET /health (no key; 503 once the process was told to stop or the engine has died), GET /v1/models,
POST /v1/chat/completions, POST /v1/completions.
"""

import json
import os
import secrets
import signal
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from .engines import start_engine
from .limits import Guard, Limits, patient_protocol
from .stream import Engine, EngineError, Piece
from .wire import ChatRequest, CompletionRequest, Reply, error_body, explain

R = TypeVar("R", ChatRequest, CompletionRequest)


class Gateway:
    """The routes over one engine, and the state that /health shows."""

    def __init__(self, engine: Engine, model_name: str, limits: Limits) -> None:
        self.engine, self.model_name, self.limits = engine, model_name, limits
        self.draining = False
        self.started = int(time.time())

    def routes(self) -> FastAPI:
        """The FastAPI application, without the guard."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/chat/completions")(self.chat_completions)
        app.post("/v1/completions")(self.completions)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(EngineError, _engine_error)
        return app

    async def health(self) -> Response:
        """Readiness: 200 only while new requests are welcome."""
        if self.draining:
            return JSONResponse({"status": "draining"}, 503)
        if not self.engine.alive():
            return JSONResponse({"status": "engine has ended"}, 503)
        return JSONResponse({"status": "ok"})

    def _model_object(self) -> dict[str, Any]:
        return {"id": self.model_name, "object": "model", "created": self.started, "owned_by": "shipyard"}

    async def models(self) -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def model(self, name: str) -> Response:
        """One model by name."""
        self._check_model(name)
        return JSONResponse(self._model_object())

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            raise HTTPException(404, f"model: {name[:100]!r} is not served here; this is {self.model_name!r}")

    async def _read(self, request: Request, kind: type[R]) -> R:
        try:
            parsed = kind.model_validate_json(await request.body())
        except ValidationError as error:
            message, field = explain(error)
            raise HTTPException(400, message, {"x-param": field} if field and field.isascii() else None) from None
        self._check_model(parsed.model)
        return parsed

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        asked = await self._read(request, ChatRequest)
        pieces = self.engine.chat([message.plain() for message in asked.messages], asked.sampling())
        return await self._answer(asked, pieces, chat=True)

    async def completions(self, request: Request) -> Response:
        """Continue a text, whole or as a stream of server-sent events."""
        asked = await self._read(request, CompletionRequest)
        return await self._answer(asked, self.engine.complete(asked.prompt, asked.sampling()), chat=False)

    async def _answer(
        self, asked: ChatRequest | CompletionRequest, pieces: AsyncIterator[Piece], chat: bool
    ) -> Response:
        reply = Reply(("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex, self.model_name, chat)
        stream = cast(Any, pieces)  # an async generator: aclosing() ends the generation whatever happens
        if asked.stream:
            count = asked.stream_options is not None and asked.stream_options.include_usage
            first = await anext(stream)  # so that a request the engine refuses gets a status, not a broken stream
            return StreamingResponse(_events(reply, first, stream, count), media_type="text/event-stream")
        text, last = "", Piece("")
        async with aclosing(stream):
            async for last in stream:
                text += last.text
        usage = reply.usage(last.prompt_tokens, last.completion_tokens)
        return JSONResponse(reply.whole(text, last.finish or "stop", usage))


async def _events(reply: Reply, first: Piece, rest: Any, count: bool) -> AsyncIterator[str]:
    """Server-sent events. A stream that breaks off ends with an error event and without [DONE]."""
    async with aclosing(rest):
        piece = first
        if reply.chat:
            yield _event(reply.chunk("", first=True))
        try:
            while piece.finish is None:
                yield _event(reply.chunk(piece.text))
                piece = await anext(rest)
        except (EngineError, StopAsyncIteration) as error:
            yield _event(error_body(502, str(error) or "the engine broke off"))
            return
        if piece.text:
            yield _event(reply.chunk(piece.text))
        yield _event(reply.chunk(None, piece.finish))
        if count:
            yield _event(reply.usage_chunk(reply.usage(piece.prompt_tokens, piece.completion_tokens)))
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "model_not_found" if error.status_code == 404 and str(error.detail).startswith("model:") else None
    param = (error.headers or {}).get("x-param")
    return JSONResponse(error_body(error.status_code, str(error.detail), param, code), error.status_code)


async def _engine_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    return JSONResponse(error_body(error.status, str(error)), error.status)


class DrainingServer(uvicorn.Server):
    """uvicorn that on SIGTERM first says 503 at /health, then closes the port, finishes what runs, and ends with 0."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, ready: str) -> None:
        super().__init__(config)
        self.gateway, self.ready = gateway, ready
        self.close_at: float | None = None

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Open the port, then say so in one line."""
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            print(self.ready.replace("{port}", str(port)), flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain (Ctrl-C without waiting for a load balancer to notice). Second: end now."""
        if self.gateway.draining:
            self.force_exit = True
        self.gateway.draining = True
        self.close_at = time.monotonic() + (self.gateway.limits.notice_s if sig == signal.SIGTERM else 0.0)

    async def on_tick(self, counter: int) -> bool:
        """Close the port once the notice is over."""
        if self.close_at is not None and time.monotonic() >= self.close_at:
            self.should_exit = True
        return await super().on_tick(counter)


def build_server(engine: Engine, model_name: str, host: str, port: int, key: str, limits: Limits) -> DrainingServer:
    """A server for an engine that is up; it prints one line when it listens. Port 0: the system picks one."""
    gateway = Gateway(engine, model_name, limits)
    guard = Guard(gateway.routes(), limits, key)
    config = uvicorn.Config(
        cast(Any, guard),
        host=host,
        port=port,
        http=patient_protocol(limits.header_timeout_s),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.drain_timeout_s),
    )
    shown = f"http://{host}:{{port}}/v1"
    return DrainingServer(config, gateway, f"serving {model_name} with {engine.name} at {shown}")


def serve(
    model: Path,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    name: str | None = None,
    context: int = 4096,
    slots: int = 4,
    limits: Limits | None = None,
) -> None:
    """Serve `model` until a signal comes. The key is `key`, else SHIPYARD_API_KEY, else a new one, printed once.

    Raises ValueError when the engine cannot start or the port is taken.
    """
    secret = key or os.environ.get("SHIPYARD_API_KEY")
    if not secret:
        secret = secrets.token_urlsafe(24)
        print(f"SHIPYARD_API_KEY={secret}", flush=True)
    running = start_engine(model, engine, context, slots)
    try:
        path = model.resolve()
        shown = name or (path.stem if path.suffix == ".gguf" else path.name)
        server = build_server(running, shown, host, port, secret, limits or Limits())
        try:
            server.run()
        except SystemExit:
            raise ValueError(f"port: {host}:{port} cannot be opened; it may be taken, give another --port") from None
    finally:
        running.stop()

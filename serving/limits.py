"""What stands before the gateway's routes: the key, the size and pace of requests, the number of generations at once.

Plain ASGI and a uvicorn protocol. Everything is refused as early as it can be: without a key before a byte of the body
is read, a large body when its length is announced or exceeded, a slow one at a deadline, a vanished client at once.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .wire import error_body

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Bounds of the gateway. `generations` run at once; `connections` are held open at once."""

    body_bytes: int = 1 << 20
    header_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    generations: int = 16
    connections: int = 512
    notice_s: float = 3.0  # after SIGTERM: how long /health says 503 before the port closes
    drain_timeout_s: float = 120.0


class Refusal(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Guard:
    """ASGI middleware: key, body, concurrency, and the end of a request whose client has gone."""

    def __init__(self, app: App, limits: Limits, key: str) -> None:
        self.app, self.limits, self.key = app, limits, key.encode()
        self.generating = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "websocket":
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self.app(scope, receive, send)
        try:
            self._check_key(scope)
            if scope["method"] != "POST":
                return await self.app(scope, receive, send)
            body = await self._read_body(scope, receive)
            if self.generating >= self.limits.generations:
                raise Refusal(
                    429, f"{self.generating} generations are running, the most there may be", {"retry-after": "1"}
                )
            self.generating += 1
            try:
                await self._run(scope, body, receive, send)
            finally:
                self.generating -= 1
        except Refusal as refusal:
            await _refuse(send, refusal)

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        wanted = b"Bearer " + self.key
        if len(given) != 1 or not hmac.compare_digest(given[0], wanted):
            raise Refusal(
                401, "no valid key; send the header Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
            )

    async def _read_body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        limit = self.limits.body_bytes
        too_large = Refusal(413, f"the body is larger than {limit} bytes")
        announced = [value for name, value in scope["headers"] if name == b"content-length"]
        if announced and int(announced[0]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise Refusal(400, "the client has gone")
                    body += event.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not event.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.limits.body_timeout_s:g} s") from None

    async def _run(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        """Run the app on a body that has been read; cancel it when the client goes or no longer reads."""
        given = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # the end of the client is watched below, not by the app
            raise AssertionError

        async def patient_send(event: MutableMapping[str, Any]) -> None:
            async with asyncio.timeout(self.limits.write_timeout_s):
                await send(event)

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work, watch = asyncio.ensure_future(self.app(scope, replay, patient_send)), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            work.cancel()  # does nothing to work that is done
            results = await asyncio.gather(work, watch, return_exceptions=True)
        if isinstance(results[0], TimeoutError):
            return  # the client stopped reading; uvicorn closes the connection of an unfinished reply
        if isinstance(results[0], Exception):
            raise results[0]


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps(error_body(refusal.status, str(refusal))).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    raw = [(name.encode(), value.encode()) for name, value in {**headers, **refusal.headers}.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def patient_protocol(header_timeout_s: float) -> type[H11Protocol]:
    """A uvicorn protocol that closes a connection whose request line and headers do not arrive in time."""

    class PatientProtocol(H11Protocol):
        """H11 with a deadline for headers, on a new connection and on a kept one alike."""

        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _disarm(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._disarm()
            elif self.late is None:
                self.late = self.loop.call_later(header_timeout_s, self._close_late)

        def _close_late(self) -> None:
            self.late = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return PatientProtocol

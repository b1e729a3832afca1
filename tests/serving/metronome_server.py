"""A gateway in a process of its own over an engine that ticks: `python metronome_server.py LIMITS_JSON`."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence

from shipyard.serving.gateway import build_server
from shipyard.serving.limits import Limits
from shipyard.serving.stream import EngineError, Piece, Sampling


class Metronome:
    """Ticks max_tokens times, one every 50 ms. The prompt "break" fails after 2, "refuse" at once, "flood" is fast."""

    name = "metronome"
    slots = 8

    def chat(self, messages: Sequence[dict[str, str]], sampling: Sampling) -> AsyncIterator[Piece]:
        """Answer the last message."""
        return self.complete(messages[-1]["content"], sampling)

    async def complete(self, prompt: str, sampling: Sampling) -> AsyncIterator[Piece]:
        """Tick."""
        if prompt == "refuse":
            raise EngineError(400, "prompt: too long")
        count = sampling.max_tokens or 1
        for tick in range(count):
            if prompt == "break" and tick == 2:
                raise EngineError(502, "the spring broke")
            await asyncio.sleep(0 if prompt == "flood" else 0.05)
            yield Piece("x" * 65536 if prompt == "flood" else f"tick{tick} ")
        yield Piece("", "length", 1, count)

    def alive(self) -> bool:
        """Always."""
        return True

    def stop(self) -> None:
        """Nothing to end."""


if __name__ == "__main__":
    build_server(Metronome(), "metronome", "127.0.0.1", 0, "secret", Limits(**json.loads(sys.argv[1]))).run()

"""What an engine is to the gateway: something that turns messages or a prompt into a stream of pieces of text."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How to sample. `max_tokens` None: until the model ends or its context is full. Temperature 0 is greedy."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some text; the last piece has `finish` ("stop" or "length") and the counts of tokens."""

    text: str
    finish: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EngineError(Exception):
    """An engine could not answer: `status` is 400 when the request is at fault (a prompt too long), else 502."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Engine(Protocol):
    """One loaded model. Closing the iterator of chat() or complete() ends the generation and frees its slot."""

    name: str
    slots: int

    def chat(self, messages: Sequence[dict[str, str]], sampling: Sampling) -> AsyncIterator[Piece]:
        """Answer a conversation."""
        ...

    def complete(self, prompt: str, sampling: Sampling) -> AsyncIterator[Piece]:
        """Continue a text."""
        ...

    def alive(self) -> bool:
        """Whether it can still answer."""
        ...

    def stop(self) -> None:
        """End it and everything it started."""
        ...


class StopFilter:
    """Holds back text that may be the beginning of a stop string, and cuts the stream at the first whole one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = [text for text in stop if text]
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Add text; returns what may be sent and whether a stop string was reached."""
        self.held += text
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            sent, self.held = self.held[: min(found)], ""
            return sent, True
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        keep = 0
        for size in range(1, min(longest, len(self.held)) + 1):
            if any(stop.startswith(self.held[-size:]) for stop in self.stop):
                keep = size
        cut = len(self.held) - keep
        sent, self.held = self.held[:cut], self.held[cut:]
        return sent, False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        sent, self.held = self.held, ""
        return sent

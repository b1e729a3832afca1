"""OpenAI's wire format, as much of it as is served: requests with every field bounded, replies, errors."""

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .stream import Sampling

ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class TextPart(_Strict):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, max_length=64)

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(_Strict):
    """Whether the stream ends with a chunk that counts tokens."""

    include_usage: bool = False


class _Request(_Strict):
    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    user: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _check(self) -> "_Request":
        if self.n != 1:
            raise ValueError(f"n: {self.n}, only 1 answer is given; send the request {self.n} times")
        if any(not 0 < len(text) <= 256 for text in self.stops()) or len(self.stops()) > 4:
            raise ValueError("stop: at most 4 strings of 1 to 256 characters")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def limit(self) -> int | None:
        """The greatest number of tokens to generate."""
        return self.max_tokens

    def sampling(self) -> Sampling:
        """What an engine needs of it."""
        return Sampling(self.limit(), self.temperature, self.top_p, self.seed, self.stops())


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)

    def limit(self) -> int | None:
        """The newer name of the limit goes first."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str


def explain(error: ValidationError) -> tuple[str, str | None]:
    """The first fault of a request as one line and the field's name. The rejected value itself is never echoed."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return (f"{field}: {message}" if field else message)[:500], field or None


class Reply:
    """Builds one request's replies: whole or in chunks, for chat or for plain completions."""

    def __init__(self, request_id: str, model: str, chat: bool) -> None:
        self.chat = chat
        name = "chat.completion" if chat else "text_completion"
        self.head = {"id": request_id, "object": name, "created": int(time.time()), "model": model}

    def usage(self, prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
        """Counts of tokens."""
        total = prompt_tokens + completion_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return {**self.head, "choices": [choice], "usage": usage}

    def chunk(self, text: str | None, finish: str | None = None, first: bool = False) -> dict[str, Any]:
        """One event of a stream; the first one of a chat names the role."""
        head = {**self.head, "object": "chat.completion.chunk"} if self.chat else self.head
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text is not None:
            delta["content"] = text
        content = {"delta": delta} if self.chat else {"text": text or ""}
        return {**head, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish}]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The event that counts tokens, after the last text."""
        return {**self.chunk(None), "choices": [], "usage": usage}

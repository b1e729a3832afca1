"""The transformers engine: a generation loop of our own in a worker thread, streaming through a bounded queue."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from .stream import EngineError, Piece, Sampling, StopFilter
from .vocabulary import end_token_ids

QUEUED_PIECES = 32  # a client that reads slowly stops the loop here


def sample(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token id from fp32 logits, after temperature and nucleus (top-p) truncation."""
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    probs_V = (logits_V / sampling.temperature).softmax(-1)
    if sampling.top_p < 1.0:
        sorted_V, order_V = probs_V.sort(descending=True)
        before_V = sorted_V.cumsum(-1) - sorted_V  # mass before each token: the first one is always kept
        sorted_V[before_V >= sampling.top_p] = 0.0
        return int(order_V[torch.multinomial(sorted_V, 1, generator=generator)])
    return int(torch.multinomial(probs_V, 1, generator=generator))


@torch.inference_mode()
def generate_ids(
    model: PreTrainedModel, ids: Sequence[int], sampling: Sampling, cancelled: threading.Event
) -> Iterator[int]:
    """Yield token ids until the caller stops asking or `cancelled` is set. The cache grows by one token a step."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    cache = DynamicCache(config=model.config)
    inputs_BT = torch.tensor([list(ids)], device=model.device)
    while not cancelled.is_set():
        output = model(input_ids=inputs_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = sample(output.logits[0, -1].float().cpu(), sampling, generator)
        yield token
        inputs_BT = torch.tensor([[token]], device=model.device)


class Detokenizer:
    """Turns a growing list of ids into text pieces that never end inside a character."""

    def __init__(self, tokenizer: object) -> None:
        self.decode = tokenizer.decode  # type: ignore[attr-defined]
        self.ids: list[int] = []
        self.start = self.sent = 0  # ids[start:sent] are decoded again as context, for spaces depend on neighbours

    def feed(self, token: int) -> str:
        """Add an id; returns the text that is now certain."""
        self.ids.append(token)
        new = self.flush()
        if new == "" or new.endswith("\ufffd"):
            return ""
        self.start, self.sent = self.sent, len(self.ids)
        return new

    def flush(self) -> str:
        """The text that was not certain yet, at the end of the generation."""
        before = self.decode(self.ids[self.start : self.sent], skip_special_tokens=True)
        return self.decode(self.ids[self.start :], skip_special_tokens=True)[len(before) :]


class TransformersEngine:
    """A Hugging Face model directory run by transformers; one generation at a time, others wait."""

    name = "transformers"
    slots = 1

    def __init__(self, model_dir: Path, context: int) -> None:
        """Load on a GPU in bf16 when there is one, else on the CPU in fp32. `context` in tokens."""
        on_gpu = torch.cuda.is_available()
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        dtype = torch.bfloat16 if on_gpu else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        self.model = model.to("cuda" if on_gpu else "cpu").eval()
        self.end_ids = set(end_token_ids(model_dir))
        self.context = min(context, self.model.config.max_position_embeddings)
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="generate")

    def alive(self) -> bool:
        """Always: it lives in this process."""
        return True

    def stop(self) -> None:
        """Take no more work."""
        self.worker.shutdown(wait=False, cancel_futures=True)

    def chat(self, messages: Sequence[dict[str, str]], sampling: Sampling) -> AsyncIterator[Piece]:
        """Answer a conversation; the model's own chat template renders it."""
        if self.tokenizer.chat_template is None:
            raise EngineError(400, "messages: this model has no chat template; use /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template speaks through jinja2.TemplateError or whatever its expressions raise
            raise EngineError(400, f"messages: the model's chat template refuses them: {error}") from None
        return self._stream(self.tokenizer(str(text), add_special_tokens=False)["input_ids"], sampling)

    def complete(self, prompt: str, sampling: Sampling) -> AsyncIterator[Piece]:
        """Continue a text."""
        return self._stream(self.tokenizer(prompt)["input_ids"], sampling)

    def pieces(self, ids: Sequence[int], sampling: Sampling, cancelled: threading.Event) -> Iterator[Piece]:
        """The pieces of one generation, in the calling thread."""
        room = self.context - len(ids)
        limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        words, stops = Detokenizer(self.tokenizer), StopFilter(sampling.stop)
        count, finish, stopped = 0, "length", False
        for token in generate_ids(self.model, ids, sampling, cancelled):
            count += 1
            if token in self.end_ids:
                finish = "stop"
                break
            text, stopped = stops.feed(words.feed(token))
            if text:
                yield Piece(text)
            if stopped:
                finish = "stop"
                break
            if count >= limit:
                break
        rest = "" if stopped else stops.feed(words.flush())[0] + stops.flush()
        yield Piece(rest, finish, len(ids), count)

    async def _stream(self, ids: Sequence[int], sampling: Sampling) -> AsyncIterator[Piece]:
        if not 0 < len(ids) < self.context:
            raise EngineError(400, f"prompt: {len(ids)} tokens, the context holds {self.context} with the answer")
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue(QUEUED_PIECES)
        loop, cancelled = asyncio.get_running_loop(), threading.Event()

        def send(item: Piece | Exception) -> None:
            waiting = asyncio.run_coroutine_threadsafe(queue.put(item), loop)
            while not cancelled.is_set():
                with contextlib.suppress(StillWaiting):
                    return waiting.result(0.2)
            waiting.cancel()

        def run() -> None:
            try:
                for piece in self.pieces(ids, sampling, cancelled):
                    if cancelled.is_set():
                        return
                    send(piece)
            except Exception as error:
                send(error)

        work = self.worker.submit(run)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise EngineError(502, f"generation failed: {item}") from item
                yield item
                if item.finish is not None:
                    return
        finally:
            cancelled.set()
            work.cancel()

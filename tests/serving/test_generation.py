"""The transformers engine: its cache changes nothing, its text is whole, its stops stop, its end ends."""

import asyncio
import threading
from contextlib import aclosing
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shipyard.serving.generation import Detokenizer, TransformersEngine, generate_ids, sample
from shipyard.serving.stream import EngineError, Piece, Sampling, StopFilter
from tiny_models import make_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return TransformersEngine(make_model(tmp_path_factory.mktemp("model") / "llama", "llama"), context=256)


def test_the_cache_changes_nothing(engine: TransformersEngine) -> None:
    ids = engine.tokenizer("Once upon a time")["input_ids"]
    cached = list(islice(generate_ids(engine.model, ids, Sampling(temperature=0.0), threading.Event()), 12))
    whole = list(ids)
    for _ in range(12):
        with torch.inference_mode():
            whole.append(int(engine.model(torch.tensor([whole]), use_cache=False).logits[0, -1].argmax()))
    assert cached == whole[len(ids) :]


def test_a_seed_repeats_and_top_p_cuts() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, -5.0])
    draws = [sample(logits, Sampling(top_p=0.7), torch.Generator().manual_seed(i)) for i in range(200)]
    assert set(draws) == {0, 1}  # 0.66 and 0.24: the second token is the one that crosses 0.7
    again = [sample(logits, Sampling(top_p=0.7), torch.Generator().manual_seed(i)) for i in range(200)]
    assert draws == again


@given(
    st.lists(st.text("ab<|>", max_size=5), max_size=12), st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=3)
)
def test_stop_strings_cut_whatever_the_pieces(pieces: list[str], stop: list[str]) -> None:
    whole, filtered, sent = "".join(pieces), StopFilter(stop), ""
    for piece in pieces:
        text, stopped = filtered.feed(piece)
        sent += text
        if stopped:
            break
    else:
        sent += filtered.flush()
    ends = [whole.find(text) + len(text) for text in stop if text in whole]
    assert (sent == whole) if not ends else (sent in [whole[: whole.find(text)] for text in stop if text in whole])


def test_pieces_never_end_inside_a_character(engine: TransformersEngine) -> None:
    text = "naïve 😀👩‍👩‍👧 日本 x"
    words, pieces = Detokenizer(engine.tokenizer), []
    for token in engine.tokenizer(text)["input_ids"]:
        pieces.append(words.feed(token))
    assert "".join(pieces) + words.flush() == text
    assert all("\ufffd" not in piece for piece in pieces)


def collect(engine: TransformersEngine, prompt: str, sampling: Sampling) -> list[Piece]:
    async def run() -> list[Piece]:
        return [piece async for piece in engine.complete(prompt, sampling)]

    return asyncio.run(run())


def test_it_counts_and_ends(engine: TransformersEngine) -> None:
    pieces = collect(engine, "Hello", Sampling(max_tokens=9, temperature=0.0))
    assert (pieces[-1].finish, pieces[-1].completion_tokens) == ("length", 9)
    text = "".join(piece.text for piece in pieces)
    first = collect(engine, "Hello", Sampling(max_tokens=9, temperature=0.0, stop=(text[3:5],)))
    assert first[-1].finish == "stop"
    assert "".join(piece.text for piece in first) == text[: text.find(text[3:5])]
    with pytest.raises(EngineError, match="the context holds 256"):
        collect(engine, "word " * 500, Sampling(max_tokens=9))


def test_a_closed_stream_frees_the_worker(engine: TransformersEngine) -> None:
    async def run() -> Piece:
        endless = engine.complete("Hello", Sampling(seed=1))
        async with aclosing(endless):
            await anext(endless)
        async with aclosing(engine.complete("Hello", Sampling(max_tokens=1))) as stream:
            return [piece async for piece in stream][-1]

    assert asyncio.run(asyncio.wait_for(run(), 20)).completion_tokens == 1

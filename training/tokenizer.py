"""A small tokenizer of one's own: byte-level BPE learned from the documents that a recipe trains on."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import cut, documents
from .duplicates import document_hash
from .manifest import new_directory, read_manifest
from .quarantine import Quarantine
from .recipe import Recipe

END = "<|end|>"
CONTINUE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A model that was only pretrained goes on from a text; so its chat template is the text itself."""


def train_tokenizer(recipe: Recipe, size: int) -> Path:
    """Learn a byte-level BPE of `size` tokens (Sennrich et al. 2016) and write it to the directory model.tokenizer.

    Documents that are held out of the shards are not learned from. Raises ValueError, one line.
    """
    name = recipe.model.tokenizer
    if name is None or name.startswith("asset:"):
        raise ValueError("model.tokenizer: name a directory for the tokenizer, runs/tokenizer for instance")
    target = Path(name)
    if target.exists() and not _made_here(target):
        raise ValueError(
            f"model.tokenizer: {target} is there, and not of this command's making; name another directory"
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size <= len(alphabet):
        raise ValueError(f"size: {size}, but the bytes and the end of a text take {len(alphabet) + 1}; ask for more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(_texts(recipe), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = CONTINUE
    with new_directory(target, {"kind": "tokenizer", "size": len(fast)}) as scratch:
        fast.save_pretrained(scratch)
    return target


def _made_here(target: Path) -> bool:
    """Whether a directory holds a tokenizer of this command's: a run's model is committed as well."""
    with contextlib.suppress(ValueError):
        return read_manifest(target).about.get("kind") == "tokenizer"
    return False


def _texts(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    limit = int(data.validation_fraction * 2**64)
    pieces = (documents(piece, data, Quarantine(data.on_bad_row)) for piece in cut(data))
    for text in itertools.chain.from_iterable(pieces):
        if int.from_bytes(document_hash(text)[:8], "big") >= limit:
            yield text

"""A Hugging Face model directory's tokenizer, in the words of GGUF: tokens, types, merges, `pre`, ends of turn.

llama.cpp does not read the regular expressions of a tokenizer.json: it knows some by name (`tokenizer.ggml.pre`). A
wrong name shows only on texts rich in digits, contractions, CJK or spaces, so an unknown one is refused here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)

# The steps of a tokenizer.json's pre_tokenizer -> (llama.cpp's name, whether llama.cpp then sets ignore_merges).
PRE_TOKENIZERS: dict[tuple[str, ...], tuple[str, bool]] = {
    ("bytes+words",): ("gpt-2", False),
    ("digits", "bytes+words"): ("smollm", False),
    (f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}{{1,3}}|{_TAIL}", "bytes"): ("llama-bpe", True),
    (f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}|{_TAIL}", "bytes"): ("qwen2", False),
    (_TEKKEN, "bytes"): ("tekken", True),
    (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK, "bytes"): ("deepseek-v3", False),
}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF holds of a tokenizer. `tokens[i]` is token i's text, padded to the model's vocabulary size."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos_id: int | None
    pad_id: int | None
    unknown_id: int | None
    end_ids: list[int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError that names the file when it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"model: {path.parent} has no {path.name}; give a Hugging Face model directory")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: {path} is not valid JSON ({error}); write the model again") from None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_chat_template(model_dir: Path) -> str | None:
    """Return the Jinja chat template, from chat_template.jinja or tokenizer_config.json; None if there is none."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _optional_json(model_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # older checkpoints: [{"name": "default", "template": ...}, ...]
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Flatten a pre_tokenizer to the steps that decide where a text is cut."""
    if pre_tokenizer is None:
        return ("none",)
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            return ("ByteLevel with add_prefix_space",)
        return ("bytes+words" if pre_tokenizer.get("use_regex", True) else "bytes",)
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert"):
        return (pre_tokenizer["pattern"].get("Regex", "a literal pattern"),)
    return (json.dumps(pre_tokenizer, sort_keys=True),)


def recognise_pre(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name for a tokenizer.json's rules. Raises ValueError when llama.cpp has no equal."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    if model.get("type") != "BPE":
        raise ValueError(f"tokenizer: model type {model.get('type')!r}, only byte-level BPE is exported to GGUF")
    steps = _steps(tokenizer.get("pre_tokenizer"))
    if steps not in PRE_TOKENIZERS:
        names = ", ".join(name for name, _ in PRE_TOKENIZERS.values())
        shown = " then ".join(steps)
        raise ValueError(
            f"tokenizer: pre_tokenizer {shown[:200]!r} equals none that llama.cpp knows here ({names}); "
            "export with --to hf, or serve with --engine transformers"
        )
    name, ignore_merges = PRE_TOKENIZERS[steps]
    if bool(model.get("ignore_merges")) != ignore_merges:
        raise ValueError(f"tokenizer: ignore_merges={not ignore_merges}, llama.cpp's {name!r} has {ignore_merges}")
    kinds = {normalizer["type"]} if normalizer and normalizer["type"] != "Sequence" else set()
    if normalizer and normalizer["type"] == "Sequence":
        kinds = {part["type"] for part in normalizer["normalizers"]}
    if kinds - {"NFC"}:
        raise ValueError(f"tokenizer: normalizer {sorted(kinds)}, llama.cpp applies none; export with --to hf")
    return name


def normalizes(model_dir: Path) -> bool:
    """Whether the tokenizer rewrites a text to NFC first, which llama.cpp does not do."""
    normalizer = read_json(model_dir / "tokenizer.json").get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    return any(part.get("type") == "NFC" for part in parts)


def _token_id(entry: Any, by_text: dict[str, int]) -> int | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return by_text.get(text) if isinstance(text, str) else None


def _as_ids(entry: Any) -> list[int]:
    if entry is None:
        return []
    return [int(i) for i in entry] if isinstance(entry, list) else [int(entry)]


def end_token_ids(model_dir: Path) -> list[int]:
    """Every id that ends a turn: the tokenizer's eos first, then those of generation_config.json and config.json."""
    tokenizer = read_json(model_dir / "tokenizer.json")
    by_text = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    own = _token_id(_optional_json(model_dir / "tokenizer_config.json").get("eos_token"), by_text)
    ids = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        ids += _as_ids(_optional_json(model_dir / name).get("eos_token_id"))
    return list(dict.fromkeys(ids))


def _wrapping(model_dir: Path, bos_id: int | None, end_ids: list[int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after a plain text, asked of the tokenizer itself."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model_dir)("a")["input_ids"]
    return bool(ids) and ids[0] == bos_id, len(ids) > 1 and ids[-1] in end_ids


def read_vocabulary(model_dir: Path, vocab_size: int) -> Vocabulary:
    """Read the tokenizer of a model with `vocab_size` rows. Raises ValueError for what GGUF cannot say."""
    tokenizer = read_json(model_dir / "tokenizer.json")
    pre = recognise_pre(tokenizer)
    vocab, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, i in [*vocab.items(), *((t["content"], t["id"]) for t in added)]:
        if i >= vocab_size:
            raise ValueError(f"tokenizer: token {text!r} has id {i}, the model {vocab_size} rows; use its own one")
        tokens[i], types[i] = text, NORMAL
    for token in added:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"tokenizer: token {token['content']!r} strips or wants whole words; GGUF cannot say so")
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    by_text = {**vocab, **{t["content"]: t["id"] for t in added}}
    words = _optional_json(model_dir / "tokenizer_config.json")
    bos_id, end_ids = _token_id(words.get("bos_token"), by_text), end_token_ids(model_dir)
    if not end_ids:
        raise ValueError(f"tokenizer: {model_dir} names no end-of-turn token; set eos_token in tokenizer_config.json")
    add_bos, add_eos = _wrapping(model_dir, bos_id, end_ids)
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        bos_id=bos_id,
        pad_id=_token_id(words.get("pad_token"), by_text),
        unknown_id=_token_id(words.get("unk_token"), by_text),
        end_ids=end_ids,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=read_chat_template(model_dir),
    )

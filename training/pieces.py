"""What is done to one piece of a corpus, by whatever process has it: a survey first, the tokens of what stays after.

Both are pure functions of the plan and the piece. Results are files that appear whole or not at all, a JSON file last:
a piece whose JSON is there is done. Processes share nothing but the folder, here or on Ray.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .contamination import holds_any
from .corpus import Piece, documents, piece_from_json
from .duplicates import document_hash, signature
from .manifest import FileHash
from .quarantine import Quarantine
from .recipe import Data
from .tokens import DocumentEncoder, TextTokenizer

STATE, SHARDS = "state", "shards"
TRAIN, VALIDATION, CONTAMINATED, DUPLICATE, NEAR_DUPLICATE = range(5)
SPLITS = {TRAIN: "train", VALIDATION: "validation"}
BATCH_CHARS, BATCH_DOCUMENTS = 1 << 21, 4096
Task = Callable[[Path, int], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Everything that decides what becomes of a piece."""

    data: Data
    tokenizer: TextTokenizer
    pieces: tuple[Piece, ...]
    grams: np.ndarray


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is there whole or not at all, whenever this process is killed.

    It is not forced to disk: the commit at the end does that, and compares with what was written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(content)
    draft.rename(path)


def write_json(path: Path, tree: Any) -> None:
    """Write plain values, whole or not at all."""
    write_whole(path, json.dumps(tree, ensure_ascii=False, indent=1).encode())


def read_json(path: Path) -> Any:
    """Read plain values; None if the file is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@functools.lru_cache(maxsize=1)
def load_plan(work: Path) -> Plan:
    """The plan that the first process left in the folder."""
    tree = read_json(work / STATE / "plan.json")
    pieces = tuple(piece_from_json(piece) for piece in tree["pieces"])
    tokenizer = TextTokenizer(**{**tree["tokenizer"], "before": tuple(tree["tokenizer"]["before"])})
    return Plan(Data(**tree["data"]), tokenizer, pieces, np.load(work / STATE / "grams.npy", mmap_mode="r"))


@functools.lru_cache(maxsize=1)
def _encoder(work: Path) -> DocumentEncoder:
    return DocumentEncoder(load_plan(work).tokenizer)


def survey_piece(work: Path, number: int) -> dict[str, Any]:
    """Hash every document of a piece, and look for eval text; with `near_duplicates`, its MinHash too."""
    plan, stem = load_plan(work), work / STATE / f"survey-{number:05d}"
    quarantine = Quarantine(plan.data.on_bad_row)
    hashes, contaminated, signatures = bytearray(), bytearray(), []
    for text in documents(plan.pieces[number], plan.data, quarantine):
        hashes += document_hash(text)
        contaminated.append(holds_any(text, plan.grams))
        if plan.data.near_duplicates:
            signatures.append(signature(text))
    write_whole(stem.with_suffix(".hashes"), bytes(hashes))
    write_whole(stem.with_suffix(".contaminated"), bytes(contaminated))
    if plan.data.near_duplicates:
        write_whole(stem.with_suffix(".minhash"), b"".join(values.tobytes() for values in signatures))
    done = {"documents": len(contaminated), "outside": quarantine.outside, "quarantined": quarantine.entries}
    write_json(stem.with_suffix(".json"), done)
    return {"number": number, "documents": len(contaminated)}


def survey_hashes(work: Path, number: int) -> np.ndarray:
    """Document hashes of a surveyed piece, (N, 2) uint64, mapped where there are any."""
    path = work / STATE / f"survey-{number:05d}.hashes"
    if not path.stat().st_size:
        return np.empty((0, 2), np.uint64)
    return np.memmap(path, ">u8", mode="r").reshape(-1, 2).astype(np.uint64)


def survey_contaminated(work: Path, number: int) -> np.ndarray:
    """Which documents of a surveyed piece hold eval text, bool (N,)."""
    return np.frombuffer((work / STATE / f"survey-{number:05d}.contaminated").read_bytes(), bool)


def survey_signatures(work: Path, number: int) -> np.ndarray:
    """MinHashes of a surveyed piece, (N, 128) uint32."""
    return np.frombuffer((work / STATE / f"survey-{number:05d}.minhash").read_bytes(), np.uint32).reshape(-1, 128)


def encode_piece(work: Path, number: int) -> dict[str, Any]:
    """Write the shards of a piece: the tokens of the documents that stay, train and validation apart."""
    plan, encode = load_plan(work), _encoder(work)
    verdicts = np.frombuffer((work / STATE / f"verdict-{number:05d}").read_bytes(), np.uint8)
    writers = {verdict: _ShardWriter(work, plan, number, name) for verdict, name in SPLITS.items()}
    for batch in _batches(work, number, plan, verdicts):
        encoded = encode([text for _, text in batch])
        for verdict, writer in writers.items():
            mine = [row for row, (kind, _) in enumerate(batch) if kind == verdict]
            writer.add([encoded[row] for row in mine], sum(len(batch[row][1].encode()) for row in mine))
    shards = [tree for writer in writers.values() if (tree := writer.close()) is not None]
    write_json(work / STATE / f"encoded-{number:05d}.json", {"shards": shards})
    return {"number": number, "documents": len(verdicts)}


def _batches(work: Path, number: int, plan: Plan, verdicts: np.ndarray) -> Iterator[list[tuple[int, str]]]:
    """(verdict, text) of documents that stay, as many at a time as memory allows."""
    expected = survey_hashes(work, number).astype(">u8").tobytes()
    batch: list[tuple[int, str]] = []
    size = seen = 0
    for text in documents(plan.pieces[number], plan.data, Quarantine(plan.data.on_bad_row)):
        if document_hash(text) != expected[16 * seen : 16 * seen + 16]:
            break
        verdict = int(verdicts[seen])
        seen += 1
        if verdict not in SPLITS:
            continue
        batch.append((verdict, text))
        size += len(text)
        if size >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if seen != len(verdicts):
        paths = {span.path for span in plan.pieces[number].spans}
        raise ValueError(f"data: {min(paths)} changed while shards were built from it; run `shipyard data build` again")
    if batch:
        yield batch


class _ShardWriter:
    """Streams one shard to disk, hashing on the way."""

    def __init__(self, work: Path, plan: Plan, number: int, split: str) -> None:
        self.name, self.split, self.source = f"{split}-{number:05d}", split, plan.pieces[number].source
        self.folder, self.dtype = work / SHARDS, np.dtype(plan.tokenizer.dtype).newbyteorder("<")
        self.draft = self.folder / f".{self.name}.{os.getpid()}.tmp"
        self.lengths: list[np.ndarray] = []
        self.hash, self.text_bytes = FileHash(), 0
        self.file = self.draft.open("wb")

    def add(self, documents: list[np.ndarray], text_bytes: int) -> None:
        """Append documents."""
        if documents:
            tokens = np.concatenate(documents).astype(self.dtype).tobytes()
            self.file.write(tokens)
            self.hash.update(tokens)
            self.lengths.append(np.fromiter(map(len, documents), "<u4", len(documents)))
            self.text_bytes += text_bytes

    def close(self) -> dict[str, Any] | None:
        """Give the shard its name; None if nothing is in it."""
        self.file.close()
        if not self.lengths:
            self.draft.unlink()
            return None
        lengths = np.concatenate(self.lengths).astype("<u4")
        self.draft.rename(self.folder / f"{self.name}.tokens")
        write_whole(self.folder / f"{self.name}.lengths", lengths.tobytes())
        digest = FileHash()
        digest.update(lengths.tobytes())
        counts = {"documents": len(lengths), "tokens": int(lengths.sum(dtype=np.int64)), "text_bytes": self.text_bytes}
        about = {"name": self.name, "source": self.source, "split": self.split, **counts}
        return {**about, "files": {"tokens": self.hash.entry(), "lengths": digest.entry()}}


def careful(task: Task, work: Path, number: int) -> dict[str, Any]:
    """Run a task; a user's mistake comes back as words, which travel between any processes."""
    try:
        return task(work, number)
    except ValueError as error:
        return {"number": number, "error": str(error)}

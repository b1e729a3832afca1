"""From a recipe's sources to token shards: `shipyard data build`.

Pieces of the sources are surveyed in parallel. Documents that hold eval text, or repeat an earlier one, or nearly so,
are dropped; what stays is split by hash and encoded in parallel. What is finished is not done again: a build that was
killed goes on, and its result is the same to the byte, as it is for any number of processes, here or on Ray.
"""

import contextlib
import fcntl
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .contamination import collect
from .corpus import Piece, cut, pieces_to_json, sources_of
from .duplicates import held_out, later_copies, near_copies
from .manifest import MANIFEST, Manifest, commit, disk_is_full, publish, read_manifest, verify
from .pieces import (
    CONTAMINATED,
    DUPLICATE,
    NEAR_DUPLICATE,
    SHARDS,
    SPLITS,
    STATE,
    VALIDATION,
    Task,
    encode_piece,
    load_plan,
    read_json,
    survey_contaminated,
    survey_hashes,
    survey_piece,
    survey_signatures,
    write_json,
    write_whole,
)
from .recipe import Data, Recipe
from .tokens import FORMAT, INDEX, TextTokenizer, text_tokenizer

SETTINGS = ("split", "where", "validation_fraction", "near_duplicates", "decontaminate", "on_bad_row")
"""Knobs of `data` that decide what is in shards. A mixture's weights do not: they decide how shards are read."""

Runner = Callable[[Task, Path, Sequence[int]], Iterable[dict[str, Any]]]


def build(recipe: Recipe, run: Runner, say: Callable[[str], None] = print) -> Manifest:
    """Build the recipe's shards, or verify them if they are there; return the directory's manifest.

    Raises ValueError, one line, for what the user can mend; nothing half-made gets the directory's name.
    """
    from .models import load_tokenizer

    if recipe.data.tokens is None:
        raise ValueError("data.tokens: name the directory for the shards, runs/tokens for instance")
    target = Path(recipe.data.tokens)
    with _alone(target):
        tokenizer = text_tokenizer(load_tokenizer(recipe.model))
        pieces = cut(recipe.data)
        about = {"kind": "token shards", "settings": settings(recipe.data, tokenizer), "sources": _state_of(pieces)}
        if (done := _built_before(target, about)) is not None:
            shutil.rmtree(_work(target), ignore_errors=True)
            say(f"{target}: built before, verified ({done.digest[:12]})")
            return done
        work = _begin(_work(target), about, recipe.data, tokenizer, pieces, say)
        try:
            return _build(work, target, about, run, say)
        except OSError as error:
            if disk_is_full(error):
                raise ValueError(f"disk: no space left while writing {work}; free some and run it again") from error
            raise


def settings(data: Data, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What decides the content of shards, beside the sources' files."""
    knobs = data.model_dump(mode="json", include=set(SETTINGS))
    return {"sources": list(sources_of(data)), **knobs, "tokenizer": tokenizer.digest}


def _state_of(pieces: Sequence[Piece]) -> str:
    """Hash of the sources' files: names, sizes, times of change."""
    return xxhash.xxh3_128_hexdigest(json.dumps(pieces_to_json(pieces)).encode())


def _work(target: Path) -> Path:
    return target.with_name(f".{target.name}.build")


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"data.tokens: another process is building {target}; wait for it to end") from None
        yield


def _built_before(target: Path, about: dict[str, Any]) -> Manifest | None:
    if not target.exists():
        return None
    if not (target / MANIFEST).is_file():
        raise ValueError(f"data.tokens: {target} is there and holds no token shards; name another directory")
    found = read_manifest(target).about
    if found == about:
        return verify(target)
    if found.get("kind") != about["kind"]:
        raise ValueError(f"data.tokens: {target} holds something else than token shards; name another directory")
    wanted = about["settings"]
    other = [key for key in wanted if found.get("settings", {}).get(key) != wanted[key]] or ["the files of the sources"]
    raise ValueError(
        f"data.tokens: {target} was built with another {', '.join(other)}; remove it, or name another directory"
    )


def _begin(
    work: Path, about: dict[str, Any], data: Data, tokenizer: TextTokenizer, pieces: list[Piece],
    say: Callable[[str], None],
) -> Path:  # fmt: skip
    """Take up the folder of an interrupted build, or lay out a new one."""
    old = read_json(work / STATE / "plan.json")
    if old is not None and old["about"] == about:
        done = [len(list((work / STATE).glob(f"{stage}-*.json"))) for stage in ("survey", "encoded")]
        say(f"going on: {done[0]} of {len(pieces)} pieces are surveyed, {done[1]} encoded")
        return work.absolute()
    if work.exists():
        say(f"starting over: {work} was begun with other settings or other files")
        shutil.rmtree(work)
    for folder in (STATE, SHARDS):
        (work / folder).mkdir(parents=True)
    grams = collect(data.decontaminate)
    if grams.items:
        short = f"; {grams.short} shorter than 13 words cannot be looked for" if grams.short else ""
        say(f"decontaminate: {grams.items} texts, {len(grams.hashes)} runs of 13 words{short}")
    np.save(work / STATE / "grams.npy", grams.hashes)
    tree = {"about": about, "data": data.model_dump(mode="json"), "tokenizer": asdict(tokenizer)}
    write_json(work / STATE / "plan.json", {**tree, "pieces": pieces_to_json(pieces)})
    return work.absolute()


def _build(work: Path, target: Path, about: dict[str, Any], run: Runner, say: Callable[[str], None]) -> Manifest:
    load_plan.cache_clear()
    plan = load_plan(work)
    numbers = range(len(plan.pieces))
    for stage, task in (("survey", survey_piece), ("encoded", encode_piece)):
        if stage == "encoded":
            _judge(work, len(numbers), plan.data)
        todo = [n for n in numbers if not (work / STATE / f"{stage}-{n:05d}.json").is_file()]
        for result in run(task, work, todo):
            if "error" in result:
                raise ValueError(result["error"])
    counts = _write_index(work, plan.tokenizer, sources_of(plan.data), len(numbers))
    if not counts["train"]:
        raise ValueError(f"data.train: nothing is left to train on ({_in_words(counts)}); look at data.on_bad_row")
    for stray in (work / SHARDS).glob(".*.tmp"):
        stray.unlink()
    manifest = commit(work / SHARDS, about)
    _compare(work, manifest, len(numbers))
    publish(work / SHARDS, target)
    shutil.rmtree(work, ignore_errors=True)
    say(f"{target}: {_in_words(counts)}")
    return Manifest(target, manifest.files, manifest.about)


def _judge(work: Path, pieces: int, data: Data) -> None:
    """Decide what becomes of every document, in the order of the corpus."""
    documents = sum(read_json(work / STATE / f"survey-{n:05d}.json")["documents"] for n in range(pieces))
    copies = later_copies(functools.partial(survey_hashes, work), pieces, documents)
    verdicts = []
    for number in range(pieces):
        verdict = np.where(held_out(survey_hashes(work, number), data.validation_fraction), VALIDATION, 0)
        verdict[copies[number]] = DUPLICATE
        verdict[survey_contaminated(work, number)] = CONTAMINATED
        verdicts.append(verdict.astype(np.uint8))
    if data.near_duplicates:
        signatures = (
            [one if verdict in SPLITS else None for one, verdict in zip(survey_signatures(work, n), row, strict=True)]
            for n, row in enumerate(verdicts)
        )
        for verdict, near in zip(verdicts, near_copies(signatures, data.near_duplicates), strict=True):
            verdict[near] = NEAR_DUPLICATE
    for number, verdict in enumerate(verdicts):
        write_whole(work / STATE / f"verdict-{number:05d}", verdict.tobytes())


def _write_index(work: Path, tokenizer: TextTokenizer, sources: Sequence[str], pieces: int) -> dict[str, int]:
    """Write index.json, and the rows that were put aside; return what became of all documents."""
    surveys = [read_json(work / STATE / f"survey-{n:05d}.json") for n in range(pieces)]
    encoded = [read_json(work / STATE / f"encoded-{n:05d}.json") for n in range(pieces)]
    shards = [{k: v for k, v in shard.items() if k != "files"} for tree in encoded for shard in tree["shards"]]
    aside = [entry for survey in surveys for entry in survey["quarantined"]]
    verdicts = [np.frombuffer((work / STATE / f"verdict-{n:05d}").read_bytes(), np.uint8) for n in range(pieces)]
    tally = np.bincount(np.concatenate(verdicts), minlength=5).tolist()
    names = ("train", "validation", "contaminated", "duplicates", "near_duplicates")
    counts = dict(zip(names, tally, strict=True))
    counts |= {"quarantined": len(aside), "outside": sum(survey["outside"] for survey in surveys)}
    for split in SPLITS.values():
        counts[f"{split}_tokens"] = sum(shard["tokens"] for shard in shards if shard["split"] == split)
    if aside:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in aside)
        write_whole(work / SHARDS / "quarantine.jsonl", lines.encode())
    about = {"sha256": tokenizer.digest, "size": tokenizer.size, "before": list(tokenizer.before), "eos": tokenizer.eos}
    tree = {"format": FORMAT, "dtype": tokenizer.dtype, "tokenizer": about, "sources": list(sources)}
    write_json(work / SHARDS / INDEX, {**tree, "counts": counts, "shards": shards})
    return counts


def _compare(work: Path, manifest: Manifest, pieces: int) -> None:
    """What is on disk must be what the processes wrote, also those before an interruption."""
    for number in range(pieces):
        for shard in read_json(work / STATE / f"encoded-{number:05d}.json")["shards"]:
            for part, entry in shard["files"].items():
                name = f"{shard['name']}.{part}"
                if manifest.files[name]["xxh3_128"] != entry["xxh3_128"]:
                    (work / STATE / f"encoded-{number:05d}.json").unlink()
                    raise ValueError(f"data: {work / SHARDS / name} has changed since it was written; run it again")


def _in_words(counts: dict[str, int]) -> str:
    dropped = {
        "exact duplicates": counts["duplicates"], "near-duplicates": counts["near_duplicates"],
        "with eval text": counts["contaminated"], "outside data.where": counts["outside"],
        "bad rows, in quarantine.jsonl": counts["quarantined"],
    }  # fmt: skip
    read = sum(counts[name] for name in ("train", "validation")) + sum(dropped.values())
    kept = ", ".join(
        f"{counts[split]:,} {word} ({counts[f'{split}_tokens']:,} tokens)"
        for split, word in (("train", "to train on"), ("validation", "held out"))
    )
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items() if number) or "none"
    return f"{read:,} documents: {kept}; dropped: {reasons}"

"""Every kind of bad row is named with its place and reason, or put aside and counted; good ones come whole."""

import csv
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shipyard.training.rows import read_rows

GOOD = b'{"text": "one"}\n'
BAD_LINES = {
    "NaN": (b'{"text": "a", "score": NaN}\n', "NaN is not JSON"),
    "Infinity": (b'{"score": -Infinity}\n', "-Infinity is not JSON"),
    "overflow": (b'{"score": 1e999}\n', "1e999 overflows"),
    "key twice": (b'{"text": "a", "text": "b"}\n', "the key 'text' is given twice"),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', "not UTF-8: byte 0xe9 at byte 14 of the line"),
    "not JSON": (b"{'text': 'a'}\n", "not JSON: .* at column 2"),
    "not an object": (b'["a"]\n', "a row must be an object .* not list"),
    "lone surrogate": (b'{"text": "\\ud83d"}\n', "an escaped lone surrogate"),
    "long number": (b'{"n": %s}\n' % (b"7" * 5000), "a number of 5000 digits; write it as text"),
    "too deep": (b'{"a": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
    "10 MB": (b'{"text": "' + b"x" * 10_000_001 + b'"}\n', "10,000,014 bytes, a row may have 10,000,000"),
}


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", list(BAD_LINES))
def test_bad_line_stops_with_its_place_or_is_put_aside(kind: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[kind]
    path = put(tmp_path, "rows.jsonl", GOOD + line + GOOD)
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {reason}"):
        read_rows(str(path))
    aside = tmp_path / "run" / "quarantine.jsonl"
    rows = read_rows(str(path), on_bad_row="quarantine", quarantine_path=aside)
    assert [row.source for row in rows.rows] == [f"{path}:1", f"{path}:3"]
    assert rows.quarantined == 1
    entry = json.loads(aside.read_text("utf-8"))
    assert entry["source"] == f"{path}:2"
    assert entry["raw"][:5] == line[:5].decode()
    assert len(entry["raw"]) <= 2000


def test_quarantine_file_of_an_earlier_run_goes(tmp_path: Path) -> None:
    aside = put(tmp_path, "quarantine.jsonl", b"old")
    read_rows(str(put(tmp_path, "rows.jsonl", GOOD)), on_bad_row="quarantine", quarantine_path=aside)
    assert not aside.exists()


def test_bom_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the file starts with a byte order mark; remove it: sed -i"):
        read_rows(str(put(tmp_path, "rows.jsonl", b"\xef\xbb\xbf" + GOOD)))
    rows = read_rows(str(tmp_path / "rows.jsonl"), on_bad_row="quarantine")
    assert (len(rows.rows), rows.quarantined) == (0, 1)
    for name, data in (("a.json", b'[{"a": 1}]'), ("a.csv", b"a\n1\n")):
        with pytest.raises(ValueError, match=f"{name}:1: the file starts with a byte order mark"):
            read_rows(str(put(tmp_path, name, b"\xef\xbb\xbf" + data)))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the file is UTF-16"):
        read_rows(str(put(tmp_path, "rows.jsonl", GOOD.decode().encode("utf-16"))), on_bad_row="quarantine")


@pytest.mark.parametrize("cut", [3, 9, 14])
def test_cut_off_last_line(cut: int, tmp_path: Path) -> None:
    path = put(tmp_path, "rows.jsonl", GOOD + GOOD[:cut])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the last line is cut off"):
        read_rows(str(path))
    assert len(read_rows(str(put(tmp_path, "whole.jsonl", GOOD + GOOD.rstrip()))).rows) == 2


def test_huge_line_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        for _ in range(60):
            file.write(b"x" * 1_000_000)
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    rows = read_rows(str(path), on_bad_row="quarantine")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.source for row in rows.rows] == [f"{path}:2"]
    assert peak < 35_000_000


def test_blank_lines_and_crlf_are_no_rows(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.jsonl", b'{"a": 1}\r\n\r\n  \n{"a": 2}\r\n\n')
    assert [(row.source, row.values) for row in read_rows(str(path)).rows] == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:4", {"a": 2}),
    ]


# --- JSON arrays ---


def test_json_array_puts_a_long_number_aside(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.json", b'[{"a": 1},\n{"a": %s},\n{"a": 3}]' % (b"7" * 5000))
    with pytest.raises(ValueError, match=r"rows.json:2: a number of 5000 digits"):
        read_rows(str(path))
    assert [row.values["a"] for row in read_rows(str(path), on_bad_row="quarantine").rows] == [1, 3]


def test_json_array_has_line_numbers(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.json", b'\n[\n  {"a": 1},\n  {"a": NaN}, {"a":\n 3},\n\n  {"a": 4}\n]\n')
    with pytest.raises(ValueError, match=r"rows.json:4: NaN is not JSON"):
        read_rows(str(path))
    rows = read_rows(str(path), on_bad_row="quarantine")
    assert [(row.source[-1], row.values["a"]) for row in rows.rows] == [("3", 1), ("4", 3), ("7", 4)]
    assert rows.quarantined == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'[{"a": 1},\n {"a": ', ":2: not JSON: .*; the file ends inside a row"),
        (b'[{"a": 1},\n {"a": "x', ":2: not JSON: .*; the file ends inside a row"),
        (b'[{"a": 1}\n', ":2: the array is not closed"),
        (b'[{"a": 1}]\n{"a": 2}', ":2: something follows the array"),
        (b'"rows"', ":1: a JSON file must hold an array"),
        (b'[\n{"a": "\xff"}]', ":2: not UTF-8: byte 0xff at byte 8"),
        (b'[{"a": 1},\n oops]', ":2: not JSON: .* no row after this one can be read"),
    ],
)
def test_broken_array_is_refused_under_both_policies(data: bytes, reason: str, tmp_path: Path) -> None:
    path = put(tmp_path, "rows.json", data)
    for policy in ("stop", "quarantine"):
        with pytest.raises(ValueError, match=f"rows.json{reason}"):
            read_rows(str(path), on_bad_row=policy)


# --- CSV ---


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=5))
def test_csv_round_trip_with_the_files_line_numbers(rows: list[tuple[str, str]], tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "round.csv"
    rows = [(a.replace("\r", "\n").replace("\0", ""), b.replace("\r", "\n").replace("\0", "")) for a, b in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([("a", "b"), *rows])
    read = read_rows(str(path)).rows
    assert [(row.values["a"], row.values["b"]) for row in read] == rows
    line = 2
    for row, (a, b) in zip(read, rows, strict=True):
        assert row.source == f"{path}:{line}"
        line += 1 + a.count("\n") + b.count("\n")


BAD_CSV = {
    "too many cells": (b"a,b,c\n", "3 cells, the header names 2 columns"),
    "not UTF-8": (b"caf\xe9,b\n", "not UTF-8: byte 0xe9"),
    "stray quote": (b'"a"b,c\n', "not CSV: "),
    "10 MB": (b"x" * 10_000_001 + b",b\n", "10,000,004 bytes, a row may have"),
}


@pytest.mark.parametrize("kind", list(BAD_CSV))
def test_bad_csv_row(kind: str, tmp_path: Path) -> None:
    line, reason = BAD_CSV[kind]
    path = put(tmp_path, "rows.csv", b'text,label\n"one\nrow",1\n' + line + b"two,0\n")
    with pytest.raises(ValueError, match=f"rows.csv:4: {reason}"):
        read_rows(str(path))
    aside = tmp_path / "quarantine.jsonl"
    rows = read_rows(str(path), on_bad_row="quarantine", quarantine_path=aside)
    assert [(row.source[-1], row.values["text"]) for row in rows.rows] == [("2", "one\nrow"), ("5", "two")]
    assert rows.quarantined == 1
    if kind != "10 MB":
        assert json.loads(aside.read_text("utf-8"))["raw"] == line.decode("utf-8", "backslashreplace")


@pytest.mark.parametrize("policy", ["stop", "quarantine"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'a,b\n"He said "hi" and\nleft",1\ntwo,0\n', "2: not CSV: .*; a quote is left open"),
        (b'a,b\none,1\n"two,0\nthree,1\n', "3: a quoted cell begins that does not end, and it would hold 2 lines"),
    ],
)
def test_a_row_without_an_end_is_neither_two_nor_the_rest_of_the_file(text: bytes, reason: str, policy, tmp_path):
    with pytest.raises(ValueError, match=f"rows.csv:{reason}"):
        read_rows(str(put(tmp_path, "rows.csv", text)), on_bad_row=policy)


def test_csv_cut_off_and_bad_header(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cut.csv:3: the last row is cut off inside a quoted cell"):
        read_rows(str(put(tmp_path, "cut.csv", b'a,b\n1,2\n3,"fou')))
    for header in (b"", b"a,a\n", b"a,\n"):
        with pytest.raises(ValueError, match=r"head.csv:1: the first line must name every column once"):
            read_rows(str(put(tmp_path, "head.csv", header)))


# --- Parquet, folders, names ---


def test_parquet_rows_are_numbered_and_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "score": [1.0, float("nan")]}), path)
    rows = read_rows(str(path)).rows
    assert [(row.source, row.values["text"]) for row in rows] == [(f"{path}:1", "a"), (f"{path}:2", "b")]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows.parquet: not a whole Parquet file"):
        read_rows(str(path))


def test_parquet_rows_are_what_was_written_before_arrow_gave_all_the_same_keys(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"city": "Paris"}}, {"name": "g", "arguments": {"sum": [{"of": 1}, {"to": 2}]}}]
    headers = pa.array([{"a": "x"}, {"b": "y"}], type=pa.map_(pa.string(), pa.string()))
    table = pa.table({"call": pa.array(calls), "none": pa.array([None, None], pa.string()), "headers": headers})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = [row.values for row in read_rows(str(tmp_path / "rows.parquet")).rows]
    assert rows == [
        {"call": calls[0], "none": None, "headers": {"a": "x"}},
        {"call": calls[1], "none": None, "headers": {"b": "y"}},
    ]


def test_hidden_folders_hold_no_rows(tmp_path: Path) -> None:
    """What an editor and `hf download` leave behind."""
    put(tmp_path, "train.jsonl", b'{"a": 1}\n')
    for folder, name in ((".ipynb_checkpoints", "train.jsonl"), (".cache/download", "train.jsonl.metadata")):
        (tmp_path / folder).mkdir(parents=True)
        put(tmp_path / folder, name, b'{"a": 1}\n')
    assert len(read_rows(str(tmp_path)).rows) == 1


def test_folder_takes_the_splits_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    put(tmp_path, "README.md", b"about")
    for name in ("train-01", "train-00", "test-00"):
        put(tmp_path / "data", f"{name}.jsonl", b'{"name": "%s"}\n' % name.encode())
    assert [row.values["name"] for row in read_rows(str(tmp_path)).rows] == ["train-00", "train-01"]
    assert [row.values["name"] for row in read_rows(str(tmp_path), split="test").rows] == ["test-00"]
    with pytest.raises(ValueError, match=r"data.split: .* no file named for split 'dev'"):
        read_rows(str(tmp_path), split="dev")
    put(tmp_path, "more.jsonl.gz", b"")
    with pytest.raises(ValueError, match=r"more.jsonl.gz has an unknown suffix"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("{folder}/reviws.csv", r"is not a file, .*did you mean .*reviews.csv\?"),
        ("{folder}/reviews.txt", "unknown suffix; use one of"),
        ("just words", "is not a file, a folder or a hub name"),
        (
            "owner/never-made",
            "'owner/never-made' is no file here, and the hub does not give its split 'train': .+; check",
        ),
    ],
)
def test_names_that_are_no_data(name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    put(tmp_path, "reviews.csv", b"a\n1\n")
    put(tmp_path, "reviews.txt", b"a")
    with pytest.raises(ValueError, match=reason):
        read_rows(name.format(folder=tmp_path))

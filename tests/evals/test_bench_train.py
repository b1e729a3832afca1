"""The training bench: every contestant trains on the same tokens, and the page says what was measured."""

from pathlib import Path

import pytest
from shipyard.evals.bench_train import Run, Table, Workload, bench_train, summarize, verdict, write_page


def workload(tiny_model: Path, rows: Path) -> Workload:
    tree = {
        "method": "sft",
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "lora": {"rank": 4},
        "data": {"train": str(rows)},
        "batch": {"size": 4, "micro": 2},
        "optim": {"lr": 1e-4, "schedule": "constant"},
    }
    return Workload("tiny", "a tiny Llama", tree, rows=10, pack_tokens=256)


def test_ours_and_two_peers_train_on_the_same_tokens(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.md"
    section = bench_train(
        out, [workload(tiny_model, chat_rows)], ("shipyard", "shipyard-one", "hf", "trl-pack"), rounds=1, threads=1
    )
    assert out.read_text().endswith(section)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in section.splitlines() if line.startswith("| ")}
    assert {"shipyard train, packed", "HF Trainer, padded", "TRL SFTTrainer, packing"} <= set(rows)
    assert rows["shipyard train, one row at a time"][3:] == [" 1.00 ", "  "]
    for name in ("shipyard train, packed", "HF Trainer, padded", "TRL SFTTrainer, packing"):
        assert float(rows[name][0]) > 0
        assert float(rows[name][2]) > 0.1
    assert rows["shipyard train, packed"][3].strip() == rows["TRL SFTTrainer, packing"][3].strip() == "1.00"
    assert float(rows["HF Trainer, padded"][3]) > 1.05  # these rows are of very different lengths
    assert "The fastest of the others is" in section


def test_a_contestant_that_fails_is_named_with_its_last_word(tiny_model, chat_rows, tmp_path) -> None:
    python = tmp_path / "env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho first; echo out of luck; exit 3\n")
    python.chmod(0o755)
    with pytest.raises(ValueError, match=r"^bench train: LitGPT .* ended with code 3: out of luck$"):
        bench_train(tmp_path / "out.md", [workload(tiny_model, chat_rows)], ("litgpt",), 1, tmp_path / "env", threads=1)
    with pytest.raises(ValueError, match="no virtual environment"):
        bench_train(tmp_path / "out.md", [], (), 1, litgpt=tmp_path)
    assert not (tmp_path / "out.md").exists()


def test_the_first_step_warms_up_and_is_not_timed() -> None:
    step = {"cpu_s": 0.0, "memory_gib": 1.0, "computed": 8}
    steps = [{**step, "at_s": 100.0, "tokens": 7}, {**step, "at_s": 102.0, "cpu_s": 4.0, "tokens": 20}]
    run = summarize("hf", steps)
    assert (run.tokens, run.tokens_per_s, run.tokens_per_cpu_s) == (27, 10.0, 5.0)
    with pytest.raises(ValueError, match="rows for two"):
        summarize("hf", steps[:1])


def test_misses_stay_in_the_page_and_other_workloads_too(tmp_path: Path) -> None:
    made = Workload("slow", "nothing", {"model": {"dtype": "float32"}, "batch": {"size": 4, "micro": 2}}, 10)
    runs = [Run("shipyard", 50, 50, 100.0, 50.0, 3.0), Run("hf", 50, 80, 90.0, 40.0, 2.0)]
    table = Table(made, tokens=50, supervised=25, runs=runs, loads=[0.5])
    assert "the bar is 1.3: missed" in verdict(table, ["hf"])
    assert verdict(table, ["hf"]) == (
        "The fastest of the others is HF Trainer, padded. Ours has 1.11 times its speed (the bar is 1.3: missed) and "
        "makes 1.25 times the most tokens that another makes in a CPU second. It takes 1.50 times its memory (the bar "
        "is 1: missed), and 1.50 times that of the one that takes least."
    )
    table.runs += [Run("hf-one", 50, 50, 95.0, 40.0, 1.0), Run("shipyard-one", 50, 50, 99.0, 49.0, 0.9)]
    said = verdict(table, ["hf", "hf-one"])
    assert said.endswith(
        "With one row at a time, as that one, ours takes 0.90 times its memory (the bar is 1: met) at 1.04 times its "
        "speed; packed, 3.00 times its memory, and 3.00 times that of the one that takes least."
    )
    del table.runs[2:]
    page = tmp_path / "page.md"
    write_page(page, table, "here")
    write_page(page, Table(Workload("another", "x", made.tree, 10), 50, 25, runs, [0.5]), "here")
    write_page(page, table, "there")
    text = page.read_text()
    assert text.count("## slow") == text.count("## another") == 1
    assert "there. 1 round;" in text
    assert "the bar is not settled: HF Trainer, one row at a time;" in text
    assert "`--litgpt DIR`" in text
    assert "| HF Trainer, padded | 90 | 40 | 2.00 | 1.60 | 1.11x |" in text


def test_the_cards_workload_wants_a_card(shipyard, tmp_path: Path) -> None:
    done = shipyard("bench", "train", "--workload", "card", "--out", tmp_path / "page.md", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--workload: card, needs a GPU" in done.stderr

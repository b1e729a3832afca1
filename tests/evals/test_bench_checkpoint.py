"""The cost of a save is measured beside real training, and written down beside torch.save's."""

from pathlib import Path

import pytest
from shipyard.evals.bench_checkpoint import Save, verdict


def test_a_page_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipyard) -> None:
    monkeypatch.chdir(tmp_path)
    printed = shipyard("bench", "checkpoint", "--shape", "tiny-llama", "--rounds", "2").stdout
    page = (tmp_path / "docs/bench-checkpoint.md").read_text()
    assert printed.strip() in page
    assert "## tiny-llama\n" in page
    assert "## tiny-llama, at most 64 MB/s\n" in page
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    assert rows == 2 * ["| save", "| ---", "| first", "| 2", "| 3", "| `torch.save`, fsync"]
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_the_bar_is_a_share_of_the_saves_own_time() -> None:
    saves = [Save(held_s, 10.0, 5, extra_s, 1.0, 0.5) for held_s, extra_s in ((0.1, 0.2), (0.3, 0.7), (0.6, 0.9))]
    assert "3.0% of a save's own time (the bar is 5%: met)" in verdict(saves)
    assert "all it lost was 7.0% (missed)" in verdict(saves)

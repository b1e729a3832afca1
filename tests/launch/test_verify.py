"""`shipyard verify`: what changed since it was written is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shipyard.launch.cli import run_command
from shipyard.launch.verify import findings_under
from shipyard.training.manifest import new_directory, read_manifest


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A parent model, a run made from it, and the run's certificate."""
    with new_directory(tmp_path / "parent", {}) as scratch:
        (scratch / "weights").write_bytes(b"parent" * 100)
    digest = read_manifest(tmp_path / "parent").digest
    with new_directory(tmp_path / "run" / "model", {"model": str(tmp_path / "parent"), "parent": digest}) as scratch:
        (scratch / "weights").write_bytes(b"child" * 100)
    certificate = {
        "subject": "merge",
        "reference": "it",
        "passed": True,
        "mean_kl": 1e-5,
        "budget": 1e-2,
        "failures": [],
    }
    (tmp_path / "run" / "certificate.json").write_text(json.dumps(certificate))
    return tmp_path / "run"


def test_whole_run_passes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(run_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [finding["kind"] for finding in report["findings"]] == ["files", "lineage", "certificate"]


def test_flipped_bit_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run_dir / "model" / "weights"
    content = bytearray(weights.read_bytes())
    content[5] ^= 1
    weights.write_bytes(content)
    assert run_command(["verify", str(run_dir)]) == 1
    assert "weights has changed" in capsys.readouterr().out


def test_other_parent_and_failed_certificate_are_named(run_dir: Path) -> None:
    with new_directory(run_dir.parent / "parent", {}) as scratch:
        (scratch / "weights").write_bytes(b"another")
    tree = json.loads((run_dir / "certificate.json").read_text())
    (run_dir / "certificate.json").write_text(json.dumps(tree | {"passed": False, "failures": ["mean KL 1"]}))
    failed = {finding.kind: finding.detail for finding in findings_under(run_dir) if not finding.passed}
    assert "now holds" in failed["lineage"]
    assert "mean KL 1" in failed["certificate"]


def test_nothing_to_check_is_not_success(tmp_path: Path) -> None:
    assert run_command(["verify", str(tmp_path)]) == 2


def test_a_file_stands_for_the_directory_that_it_was_committed_in(run_dir: Path) -> None:
    (run_dir / "rows.jsonl").write_text("{}")
    assert run_command(["verify", str(run_dir / "rows.jsonl")]) == 2
    assert run_command(["verify", str(run_dir / "certificate.json")]) == 0
    assert run_command(["verify", str(run_dir / "model" / "weights")]) == 0


def test_names_in_brackets_and_files_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with new_directory(tmp_path / "[red]" / "model", {}) as scratch:
        (scratch / "weights").write_bytes(b"x")
    with new_directory(tmp_path / "[" / "bold]", {}) as scratch:  # "[/bold]" closes what nothing opened
        (scratch / "weights").write_bytes(b"x")
    assert run_command(["verify", str(tmp_path)]) == 0
    assert "[red]/model" in capsys.readouterr().out
    for name in ("manifest.json", "certificate.json"):
        (tmp_path / name).write_text("[]")
    failed = [finding.detail for finding in findings_under(tmp_path) if not finding.passed]
    assert [detail.rpartition("manifest: ")[2].partition(";")[0] for detail in failed] == [
        f"{tmp_path / 'manifest.json'} is damaged",
        "is no certificate of shipyard's",
    ]


def test_a_damaged_checkpoint_is_named_to_the_bit_with_the_step_to_fall_back_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 8, 12):
        with new_directory(tmp_path / f"step-{step:06d}", {"step": step}) as scratch:
            save_file({"weight": torch.arange(12.0).reshape(3, 4)}, scratch / "rank-00000.safetensors")
    shards = [tmp_path / f"step-{step:06d}" / "rank-00000.safetensors" for step in (4, 8, 12)]
    flip(shards[2], shards[2].stat().st_size - 4 * 5)
    assert run_command(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    byte = shards[2].stat().st_size - 4 * 5
    assert f"bit 0 of byte {byte} was flipped, and nothing else; in weight element 7" in out
    assert "fall back to step 8: the same command goes on from step-000008 by itself" in out
    flip(shards[0], 9)
    flip(shards[1], 9)
    (tmp_path / "step-000012" / "rank-00000.safetensors").unlink()
    findings = {finding.kind: finding for finding in findings_under(tmp_path)}
    assert findings["resume"].detail == "no checkpoint is whole; the same command starts the run over"
    flip(shards[1], 9)
    assert "fall back to step 8" in {f.kind: f.detail for f in findings_under(tmp_path)}["resume"]


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)

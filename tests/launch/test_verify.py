"""`shipyard verify`: what changed since it was written is named."""

import json
from pathlib import Path

import pytest
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

"""Assets: fetched once, pinned, whole; a package's own code never runs."""

import hashlib
import io
import multiprocessing
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from shipyard.launch import assets
from shipyard.launch.assets import Asset, catalogue, resolve

TEXT = b"rows\n" * 1000
SHA256 = hashlib.sha256(TEXT).hexdigest()
WHEEL = Asset("wheel", "pypi", "cargo", "1.0", "MIT", "file", {"cargo/rows.txt": SHA256})
SOURCE = Asset(
    "source", "pypi", "ballast", "2.0", "MIT", "file", {"ballast-2.0/rows.txt": SHA256}, "setuptools.build_meta"
)


@pytest.fixture
def harbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a folder of packages that pip takes for its only index. Returns the cache."""
    packages = tmp_path / "packages"
    packages.mkdir()
    with zipfile.ZipFile(packages / "cargo-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("cargo/rows.txt", TEXT)
        wheel.writestr("cargo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: cargo\nVersion: 1.0\n")
        wheel.writestr("cargo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("cargo-1.0.dist-info/RECORD", "")
    setup = (
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='ballast', version='2.0')\n"
    )
    project = b"[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
    with tarfile.open(packages / "ballast-2.0.tar.gz", "w:gz") as archive:
        for name, content in (("rows.txt", TEXT), ("setup.py", setup.encode()), ("pyproject.toml", project)):
            member = tarfile.TarInfo(f"ballast-2.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("SHIPYARD_ASSETS", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "catalogue", lambda: {"wheel": WHEEL, "source": SOURCE})
    assets._verify_once.cache_clear()
    return tmp_path / "cache"


def _resolve_and_report(queue: multiprocessing.Queue) -> None:
    fetch = assets._fetch

    def counted(asset: Asset, directory: Path) -> None:
        queue.put("fetched")
        fetch(asset, directory)

    assets._fetch = counted
    queue.put(resolve("asset:wheel", quiet=True).read_bytes() == TEXT)


def test_two_processes_fetch_once(harbour: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_resolve_and_report, args=(queue,)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    said = [queue.get(timeout=5) for _ in range(3)]
    assert sorted(map(str, said)) == ["True", "True", "fetched"]
    assert {path.name for path in harbour.iterdir()} == {"wheel", ".wheel.lock"}


def test_second_call_is_cheap_and_needs_no_index(harbour: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve("asset:wheel", quiet=True)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    start = time.perf_counter()
    assert resolve("asset:wheel") == path
    assert time.perf_counter() - start < 0.1


def test_source_distribution_runs_nothing(harbour: Path) -> None:
    assert resolve("asset:source", quiet=True).read_bytes() == TEXT
    assert not (harbour.parent / "ran").exists()


def test_wrong_sha256_is_refused_and_leaves_nothing(harbour: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = Asset("wheel", "pypi", "cargo", "1.0", "MIT", "file", {"cargo/rows.txt": "0" * 64})
    monkeypatch.setattr(assets, "catalogue", lambda: {"wheel": forged})
    with pytest.raises(ValueError, match=r"sha256: cargo/rows\.txt of cargo-1\.0.*is pinned"):
        resolve("asset:wheel", quiet=True)
    assert {path.name for path in harbour.iterdir()} == {".wheel.lock"}


def test_flipped_bit_in_the_cache_is_named(harbour: Path) -> None:
    path = resolve("asset:wheel", quiet=True)
    damaged = bytearray(path.read_bytes())
    damaged[17] ^= 1
    path.write_bytes(damaged)
    assets._verify_once.cache_clear()  # as a new process would
    with pytest.raises(ValueError, match=r"rows\.txt has changed since.*remove .*wheel and it is fetched again"):
        resolve("asset:wheel")


def test_entry_that_changed_is_fetched_again(harbour: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("asset:wheel", quiet=True)
    newer = Asset("wheel", "pypi", "cargo", "9.9", "MIT", "file", WHEEL.members)
    monkeypatch.setattr(assets, "catalogue", lambda: {"wheel": newer})
    with pytest.raises(ValueError, match=r"pip could not fetch cargo 9\.9"):
        resolve("asset:wheel", quiet=True)


def test_names(harbour: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("data/rows.jsonl") == Path("data/rows.jsonl")
    with pytest.raises(ValueError, match="did you mean asset:wheel"):
        resolve("asset:weel")
    scoped = Asset("scoped", "npm", "@dock/crane", "1.0", "MIT", "directory", {"package/crane.json": SHA256})
    monkeypatch.setattr(assets, "catalogue", lambda: {"scoped": scoped})
    monkeypatch.setattr(assets, "_npm", lambda: None)
    with pytest.raises(ValueError, match="comes from npm, which is not on this machine"):
        resolve("asset:scoped", quiet=True)


def test_catalogue_pins_every_member() -> None:
    for asset in catalogue().values():
        assert asset.members, asset.name
        assert asset.licence, asset.name
        assert all(len(sha256) == 64 for sha256 in asset.members.values()), asset.name


@pytest.mark.parametrize("name", [name for name in catalogue() if name.startswith("tokenizer-")])
def test_tokenizers_load_as_their_file_says(name: str) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    directory = resolve(f"asset:{name}")
    text = "Hello 1234, don't  \n\n\tstop 日本語 🙂"
    expected = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False) == expected

"""GGUF files: every architecture and tokenizer certified in llama.cpp, every known fault caught."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from shipyard.serving.gguf import permute_rows, read_shape, write_gguf
from shipyard.serving.llamacpp import ScoreRequest, score
from shipyard.serving.parity import BUDGETS, certify_gguf, read_reference
from shipyard.serving.vocabulary import recognise_pre
from tiny_models import SHAPES, make_model


def edit_string(path: Path, key: str, old: str, new: str) -> None:
    """Overwrite a metadata string of a GGUF file with one of equal length."""
    reader = gguf.GGUFReader(path, "r+")
    value = reader.fields[key].parts[reader.fields[key].data[0]]
    assert bytes(value) == old.encode()
    assert len(old) == len(new)
    value[:] = np.frombuffer(new.encode(), dtype=np.uint8)


def edit_number(path: Path, key: str, new: float) -> None:
    """Overwrite a metadata number of a GGUF file."""
    reader = gguf.GGUFReader(path, "r+")
    reader.fields[key].parts[reader.fields[key].data[0]][0] = new


def undo_permutation(path: Path, heads: dict[str, int]) -> None:
    """Put the rows of q and k back as they were: what a writer without the permutation does."""
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        for part, count in heads.items():
            if tensor.name.endswith(f"{part}.weight"):
                rows = tensor.data.shape[0]
                pairs = np.array(tensor.data).reshape(count, rows // count // 2, 2, -1)
                tensor.data[:] = pairs.swapaxes(1, 2).reshape(tensor.data.shape)


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_architecture_and_tokenizer_passes(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "model", name)
    write_gguf(model, tmp_path / "f32.gguf", "f32")
    (certificate,) = certify_gguf(model, [tmp_path / "f32.gguf"])
    assert certificate.passed, certificate.line()
    assert certificate.mean_kl < BUDGETS["f32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.mark.parametrize("fault", ["permutation", "rope_theta", "pre", "end"])
def test_each_fault_fails_the_certificate(tmp_path: Path, tiny: Path, fault: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny, path, "f16")
    if fault == "permutation":
        undo_permutation(path, {"attn_q": 4, "attn_k": 2})
    elif fault == "rope_theta":
        edit_number(path, "llama.rope.freq_base", 10000.0)
    elif fault == "pre":
        edit_string(path, "tokenizer.ggml.pre", "smollm", "tekken")
    else:
        # llama.cpp also knows ends by their text, so the id asked about is made one that has no such text
        shutil.copytree(tiny, tmp_path / "model")
        (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 300]}')
        tiny = tmp_path / "model"
    (certificate,) = certify_gguf(tiny, [path])
    assert not certificate.passed
    assert certificate.failures
    assert certificate.token_ids_equal is (fault != "pre")
    assert certificate.end_tokens_end is (fault != "end")


def test_rope_factors_of_llama_3_1_are_needed(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama-3.1")
    config = json.loads((model / "config.json").read_text())
    reference = read_reference(model)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    (model / "config.json").write_text(json.dumps(config))
    write_gguf(model, tmp_path / "without.gguf", "f32")
    (certificate,) = certify_gguf(model, [tmp_path / "without.gguf"], reference)
    assert not certificate.passed


def test_quantized_files_have_budgets_of_their_own(tmp_path: Path, tiny: Path) -> None:
    paths = [tmp_path / f"{kind}.gguf" for kind in ("q8_0", "bf16")]
    for path in paths:
        write_gguf(tiny, path, path.stem)
    q8_0, bf16 = certify_gguf(tiny, paths)
    assert q8_0.reference == "its f16 GGUF"
    assert (q8_0.budget, bf16.budget) == (BUDGETS["q8_0"], BUDGETS["bf16"])
    assert q8_0.mean_kl > 0
    assert paths[0].stat().st_size < 0.75 * paths[1].stat().st_size


def test_permutation_is_the_rotary_layout() -> None:
    rows = np.arange(2 * 8)[:, None]
    assert permute_rows(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "model: architecture 'GPT2LMHeadModel'"),
        ({"hidden_act": "gelu"}, "model: hidden_act 'gelu'"),
        ({"rope_parameters": None}, "model: config.json names no rope_theta"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "model: rope_type 'dynamic'"),
        ({"vocab_size": 500}, "tokenizer: token"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tmp_path: Path, tiny: Path, change: dict, message: str) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    config = {**json.loads((tiny / "config.json").read_text()), **change}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "model", tmp_path / "out.gguf", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_unknown_pre_tokenizer_is_refused(tiny: Path) -> None:
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(ValueError, match="tokenizer: pre_tokenizer"):
        recognise_pre(tokenizer)


def test_values_beyond_f16_and_unknown_kinds_are_refused(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="beyond f16"):
        write_gguf(tmp_path / "model", tmp_path / "out.gguf", "f16")
    with pytest.raises(ValueError, match="quant: 'q4_k_m'"):
        write_gguf(tiny, tmp_path / "out.gguf", "q4_k_m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mistral")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "sliding_window": 256}))
    assert read_shape(model).context == 256


def test_a_damaged_file_is_one_line_and_not_a_crash(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny, path, "f16")
    path.write_bytes(path.read_bytes()[:-50_000])
    with pytest.raises(ValueError, match=r"gguf: llama\.cpp cannot run") as caught:
        score(ScoreRequest(str(path), [[1, 2, 3]], [], [], 1))
    assert "\n" not in str(caught.value)

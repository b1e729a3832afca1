"""From a real model to certified files to answers over HTTP; and what export refuses, leaving nothing behind."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from shipyard.launch.assets import resolve
from shipyard.serving.engines import find_gguf, start_engine
from shipyard.serving.export import export
from shipyard.serving.gateway import build_server
from shipyard.serving.limits import Limits
from shipyard.serving.parity import BUDGETS, Reference, certify_gguf, read_reference
from shipyard.training.manifest import new_directory, read_manifest, verify
from test_gguf import edit_number, edit_string, undo_permutation
from tiny_models import make_model
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.mark.parametrize("to", ["hf", "gguf", "ollama"])
def test_an_export_is_committed_with_lineage_and_certificates(tmp_path: Path, tiny: Path, to: str) -> None:
    run = tmp_path / "run"  # a run directory holds the model under model/
    shutil.copytree(tiny, run / "model")
    out = export(run, tmp_path / to, to, "f16,q8_0" if to == "gguf" else None)
    about = verify(out).about
    assert about["source"] == str(run / "model")
    assert len(about["source_digest"]) == 32
    assert all(certificate["passed"] for certificate in about["certificates"])
    names = {path.name for path in out.iterdir()}
    expected = {
        "hf": {"model.safetensors", "chat_template.jinja", "tokenizer.json", "safetensors.certificate.json"},
        "gguf": {"model-f16.gguf", "model-q8_0.gguf", "model-f16.certificate.json", "model-q8_0.certificate.json"},
        "ollama": {"model-q8_0.gguf", "Modelfile", "Modelfile.certificate.json", "model-q8_0.certificate.json"},
    }
    assert expected[to] <= names
    certificate = json.loads(next(out.glob("*.certificate.json")).read_text())
    assert certificate["passed"] is True


@pytest.mark.parametrize("to", ["hf", "litgpt"])
def test_every_chat_template_goes_along(tmp_path: Path, tiny: Path, to: str) -> None:
    """A tokenizer may have several: transformers writes all but the default one into a folder."""
    shutil.copytree(tiny, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }} with tools"}
    tokenizer.save_pretrained(tmp_path / "model")
    again = AutoTokenizer.from_pretrained(export(tmp_path / "model", tmp_path / "out", to))
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("to", "quant", "message"),
    [
        ("onnx", None, "to: 'onnx' is not one of hf, gguf, ollama, litgpt"),
        ("gguf", "q4_k_m", "quant: 'q4_k_m' is not one of"),
        ("hf", "f16", "quant: 'f16' with --to hf"),
        ("ollama", "f16,q8_0", "name one kind"),
    ],
)
def test_impossible_exports_are_refused(tmp_path: Path, tiny: Path, to: str, quant: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(tiny, tmp_path / "out", to, quant)
    assert not any(tmp_path.iterdir())


def test_a_failed_certificate_or_a_strange_directory_leaves_all_as_it_was(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    # 300 ends a turn for transformers, but its text is nothing llama.cpp knows: the certificate must fail
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 300, 301, 302]}')
    with pytest.raises(ValueError, match="parity: GGUF f16"):
        export(tmp_path / "model", tmp_path / "out", "gguf")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("all my work")
    with new_directory(tmp_path / "trained", {"kind": "model"}) as scratch:
        (scratch / "model.safetensors").write_bytes(b"a week of training")
    for mine in ("precious", "trained"):
        with pytest.raises(ValueError, match="is no export of shipyard's"):
            export(tiny, tmp_path / mine, "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "precious", "trained"]
    assert (tmp_path / "trained" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"model: .* holds no config\.json"):
        export(tmp_path / "precious", tmp_path / "out", "gguf")


def test_engines_that_cannot_start_say_what_to_do(tmp_path: Path, tiny: Path) -> None:
    for engine, message in (
        ("vllm", r"pip install 'shipyard-llm\[vllm\]'"),
        ("ollama", "not on PATH"),
        ("tgi", "engine: 'tgi' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            start_engine(tiny, engine)
    with pytest.raises(ValueError, match=r"model: .*nowhere does not exist"):
        start_engine(tmp_path / "nowhere", "transformers")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"gguf: llama\.cpp cannot serve"):
        start_engine(broken, "llamacpp")


@contextmanager
def served(model: Path, engine: str) -> Iterator[openai.OpenAI]:
    """The gateway in a thread of this process, over a real engine."""
    running = start_engine(model, engine, context=256, slots=2)
    server = build_server(running, "smollm2", "127.0.0.1", 0, "secret", Limits())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
    finally:
        server.should_exit = True
        thread.join()
        running.stop()


def test_a_real_model_from_export_to_answers(tmp_path: Path) -> None:
    """SmolLM2-135M: f16 and q8_0 pass, three faults of an f16 file fail, and both engines answer in a stream."""
    model = resolve("asset:smollm2-135m-instruct")
    out = export(model, tmp_path / "gguf", "gguf", "f16,q8_0")
    f16, q8_0 = read_manifest(out).about["certificates"]
    assert f16["mean_kl"] < 1e-5 < 1e-3 < q8_0["mean_kl"] < BUDGETS["q8_0"]

    whole = read_reference(model, ())  # the conversations alone: enough to see a fault, and cheap
    reference = Reference(model, whole.sequences[:1], whole.logits[:1])
    for fault in ("permutation", "rope_theta", "pre"):
        path = tmp_path / f"{fault}.gguf"
        shutil.copyfile(out / "model-f16.gguf", path)
        if fault == "permutation":
            undo_permutation(path, {"attn_q": 9, "attn_k": 3})
        elif fault == "rope_theta":
            edit_number(path, "llama.rope.freq_base", 10000.0)
        else:
            known = json.loads((model / "tokenizer.json").read_text())["pre_tokenizer"]["type"]
            edit_string(
                path, "tokenizer.ggml.pre", *(("gpt-2", "qwen2") if known == "ByteLevel" else ("smollm", "tekken"))
            )
        (certificate,) = certify_gguf(model, [path], reference)
        assert not certificate.passed, fault
        path.unlink()

    assert find_gguf(out) == out / "model-q8_0.gguf"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for engine, source in (("llamacpp", out / "model-f16.gguf"), ("transformers", model)):
        with served(source, engine) as client:
            stream = client.chat.completions.create(
                model="smollm2", messages=question, temperature=0, max_tokens=16, stream=True
            )
            chunks = [chunk.choices[0] for chunk in stream]
            assert "Paris" in "".join(choice.delta.content or "" for choice in chunks), engine
            assert chunks[-1].finish_reason == "stop"

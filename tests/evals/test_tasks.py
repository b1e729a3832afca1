"""Scores equal what the model says by the longest way round, and held-out rows are held out."""

import csv
import json
from pathlib import Path

import pytest
import torch
from shipyard.evals import tasks
from shipyard.training.chat import ChatEncoder
from shipyard.training.dataset import Pair, Sample, load_dataset
from shipyard.training.models import load_model, load_tokenizer
from shipyard.training.recipe import Recipe, parse_recipe
from shipyard.training.tasks import Task

WORDS = ["dull", "bright", "slow", "warm", "a long and winding tale", "odd", "sharp"]
LABELS = {"0": "negative indeed", "1": "positive"}  # several tokens each, of different number


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"{WORDS[n % 7]} film number {n} " * (1 + n % 3), str(n % 2)] for n in range(30))
    return path


def choice_recipe(model: Path, reviews: Path) -> Recipe:
    return parse_recipe({
        "method": "sft", "steps": 1, "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(reviews), "validation_rows": 12, "prompt": "Review: {text}", "completion": "{label}",
                 "labels": LABELS},
    })  # fmt: skip


def log_prob(model, prompt: list[int], reply: list[int]) -> float:
    """One row, no cache, no batch, no padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0]
    logp = torch.log_softmax(logits.double(), -1)
    return sum(float(logp[len(prompt) - 1 + at, token]) for at, token in enumerate(reply))


def whole(recipe: Recipe, tmp_path: Path):
    return load_dataset(recipe, load_tokenizer(recipe.model), tmp_path)


def test_choice_equals_one_row_at_a_time(tiny_model: Path, reviews: Path, tmp_path: Path):
    recipe = choice_recipe(tiny_model, reviews)
    result = tasks.evaluate(tiny_model, recipe, stage="before")
    model = load_model(recipe.model, trains_all=False)
    tokenizer = load_tokenizer(recipe.model)
    ends = ChatEncoder(tokenizer).end_ids
    replies = [tokenizer(text)["input_ids"] for text in LABELS.values()]
    expected = []
    for sample in whole(recipe, tmp_path).validation:
        assert isinstance(sample, Sample)
        first = int(sample.mask.argmax())
        prompt, gold = sample.ids[:first].tolist(), sample.ids[sample.mask].tolist()
        end = gold[-1]
        assert end in ends
        scored = [log_prob(model, prompt, [*reply, end]) for reply in replies]
        expected.append(float([*replies[scored.index(max(scored))], end] == gold))
    assert list(result.scores) == expected
    assert (result.n, result.stage, result.metric, result.suite) == (12, "before", "accuracy", "reviews")
    assert result.low <= result.value <= result.high
    assert result.value == sum(expected) / 12


def test_reply_scores_do_not_depend_on_the_batch(tiny_model: Path):
    """Left padding, the cache and the replies scored before leave no trace."""
    recipe = parse_recipe({"method": "sft", "steps": 1, "model": {"name": str(tiny_model), "dtype": "float32"},
                           "data": {"train": "x"}})  # fmt: skip
    model = load_model(recipe.model, trains_all=False).eval()
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 30, 31], [11]]
    replies = [[40, 41, 42, 2], [50, 2], [60]]
    with torch.inference_mode():
        logp_BC = tasks._score_replies(model, prompts, replies)
    for row, prompt in enumerate(prompts):
        for column, reply in enumerate(replies):
            assert float(logp_BC[row, column]) == pytest.approx(log_prob(model, prompt, reply), abs=2e-5)


def test_preference_equals_one_row_at_a_time(tiny_model: Path, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"It is {n}. " * (1 + n % 3), "rejected": f"No {n}, " * (1 + (n + 1) % 4)}
        for n in range(14)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe({"method": "dpo", "steps": 1, "model": {"name": str(tiny_model), "dtype": "float32"},
                           "data": {"train": str(path), "format": "preference", "validation_rows": 7}})  # fmt: skip
    result = tasks.evaluate(tiny_model, recipe)
    model = load_model(recipe.model, trains_all=False)
    for pair, score, margin in zip(whole(recipe, tmp_path).validation, result.scores, result.margins, strict=True):
        assert isinstance(pair, Pair)
        total, mean = [], []
        for sample in (pair.chosen, pair.rejected):
            first = int(sample.mask.argmax())
            total.append(log_prob(model, sample.ids[:first].tolist(), sample.ids[sample.mask].tolist()))
            mean.append(total[-1] / int(sample.mask.sum()))
        assert margin == pytest.approx(total[0] - total[1], abs=1e-4)
        assert score == float(mean[0] > mean[1])


def task_recipe(model: Path, steps: int = 4, **task_options: int) -> Recipe:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, **task_options}
    return parse_recipe({
        "method": "grpo", "steps": steps, "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": "task:chain_sum", "format": "task", "system": "Number only."}, "batch": {"size": 64},
        "grpo": {"max_new_tokens": 4, "group_size": 8, "task_options": options},
    })  # fmt: skip


def test_questions_are_new_and_distinct(tiny_model: Path):
    recipe = task_recipe(tiny_model)
    trained = Task("chain_sum", recipe.grpo.task_options, recipe.seed)
    asked = {trained.question(number).text for number in range(4 * 8)}
    _, questions = tasks._held_out_questions(recipe, 100)
    texts = [question.text for question in questions]
    assert len(set(texts)) == 100
    assert not asked & set(texts)
    other_seed = Task("chain_sum", recipe.grpo.task_options, tasks.HELD_OUT_SEED)
    assert asked & {other_seed.question(number).text for number in range(200)}, "nothing would have been left out"


def test_task_result_counts_exact_answers(tiny_model: Path):
    """A model that always says 7 and stops is right exactly where the sum is 7."""
    recipe = task_recipe(tiny_model)
    tokenizer = load_tokenizer(recipe.model)
    model = load_model(recipe.model, trains_all=False).eval()
    seven, end = tokenizer("7")["input_ids"][0], tokenizer.eos_token_id
    with torch.no_grad():  # the last token decides the next: anything -> 7, 7 -> end
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()[:, 0] = 1
        model.model.embed_tokens.weight[seven] = torch.eye(64)[1]
        model.lm_head.weight.zero_()[seven, 0] = 9
        model.lm_head.weight[end, 1] = 9
    result = tasks.evaluate_task(model, tokenizer, recipe, 100)
    _, questions = tasks._held_out_questions(recipe, 100)
    assert 0 < sum(result.scores) < 100
    assert list(result.scores) == [float(question.entry["answer"] == "7") for question in questions]


def test_too_few_questions_left(tiny_model: Path):
    with pytest.raises(ValueError, match=r"rows: 300 asked for.*ask for fewer, or widen"):
        tasks._held_out_questions(task_recipe(tiny_model), 300)


def test_results_survive_the_disk_and_pair_up(tiny_model: Path, reviews: Path, tmp_path: Path):
    recipe = choice_recipe(tiny_model, reviews)
    result = tasks.evaluate(tiny_model, recipe, rows=5)
    again = tasks.evaluate(tiny_model, recipe, rows=5)
    assert (again.rows_hash, again.scores) == (result.rows_hash, result.scores)
    assert tasks.evaluate(tiny_model, recipe, rows=6).rows_hash != result.rows_hash
    tasks.write_results(tmp_path / "results.json", [result, again])
    assert tasks.read_results(tmp_path / "results.json") == [result, again]
    (tmp_path / "broken.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"results: .*broken.json holds no results"):
        tasks.read_results(tmp_path / "broken.json")


def test_refusals(tiny_model: Path, reviews: Path):
    recipe = choice_recipe(tiny_model, reviews)
    with pytest.raises(ValueError, match=r"rows: 13 asked for, data.validation_rows holds out 12"):
        tasks.evaluate(tiny_model, recipe, rows=13)
    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"labels": None})})
    with pytest.raises(ValueError, match=r"method: sft without data.labels"):
        tasks.evaluate(tiny_model, plain)

"""A run goes on with what it began with: frozen weights are in no checkpoint, so others are refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
from runs_for_tests import forget_after, recipe_and_run
from shipyard.training.chat import ChatEncoder
from shipyard.training.loop import train
from shipyard.training.recipe import load_recipe
from tokenizers_for_tests import tokenizer_for_tests


def tree(model: Path, rows: Path, **more: Any) -> dict[str, Any]:
    return {
        "method": "sft", "steps": 2, "model": {"name": str(model), "dtype": "float32"}, "data": {"train": str(rows)},
        "batch": {"size": 4, "micro": 4}, "optim": {"lr": 1e-3}, "checkpoints": {"every_steps": 1}, **more,
    }  # fmt: skip


def test_another_base_under_adapters_is_refused(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    """An earlier stage that was trained anew in its place has another model under the same name."""
    first = tmp_path / "first"
    first.mkdir()
    base_recipe, base = recipe_and_run(first, tree(tiny_model, chat_rows))
    recipe, run = recipe_and_run(tmp_path, tree(base, chat_rows, lora={"rank": 2}))
    forget_after(run, 1)
    train(load_recipe(base_recipe, [f"run_dir={base}", "resume=never", "optim.lr=1e-2"]))
    with pytest.raises(ValueError, match=r"model.name: .* is another model than when the run"):
        train(load_recipe(recipe, [f"run_dir={run}"]))


@pytest.mark.parametrize("name", ["tokenizer-llama3", "smollm2-135m-instruct"])
def test_ids_do_not_depend_on_the_day(name: str) -> None:
    """Llama 3's own template writes the date before every conversation; the other is given one that does."""
    tokenizer = copy.copy(tokenizer_for_tests(name))
    if "strftime_now" not in tokenizer.chat_template:
        tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    talk = [{"role": "user", "content": "Which day is it?"}, {"role": "assistant", "content": "A Friday."}]
    assert "26 Jul 2024" in tokenizer.decode(ChatEncoder(tokenizer).encode(talk).ids)

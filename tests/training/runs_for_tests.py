"""Runs that tests train, cut short and compare."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from shipyard.training.checkpoint import committed
from shipyard.training.loop import train
from shipyard.training.recipe import load_recipe


def recipe_and_run(folder: Path, tree: dict[str, Any]) -> tuple[Path, Path]:
    """Write a recipe, and train it in this process: the run that others are compared with."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe, train(load_recipe(recipe, [f"run_dir={folder / 'one'}"]))


def forget_after(run: Path, step: int) -> None:
    """Make a finished run one that was interrupted after `step`."""
    shutil.rmtree(run / "model")
    for later, path in committed(run).items():
        if later > step:
            shutil.rmtree(path)

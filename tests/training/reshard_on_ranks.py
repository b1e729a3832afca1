"""Run under torchrun by test_checkpoint.py: engines take up each other's checkpoints.

reshard_on_ranks.py RECIPE HOPS, where HOPS is a JSON list of (engine, source, out). For each, an engine loads the
checkpoint `source`, begins to write what it then holds into `out`, takes one step at once, and writes again.
"""

import json
import sys
import threading
from pathlib import Path

from shipyard.training.checkpoint import Saver
from shipyard.training.exit_code import told
from shipyard.training.loop import assemble, identity, restore
from shipyard.training.manifest import read_manifest
from shipyard.training.ranks import start
from shipyard.training.recipe import load_recipe
from shipyard.training.shard import ShardImage
from shipyard.training.step import run_step


class LateSaver(Saver):
    """Copies when somebody waits for the copy and not before: an update that did not wait would be in it."""

    def __init__(self, *args) -> None:
        self.awaited = threading.Event()
        super().__init__(*args)

    def settle(self) -> None:
        self.awaited.set()
        super().settle()

    def finish(self) -> None:
        self.awaited.set()
        super().finish()
        self.awaited.clear()

    def _copy(self, *args) -> ShardImage:
        self.awaited.wait()
        return super()._copy(*args)


def main(recipe_file: str, hops: list[tuple[str, str, str]]) -> None:
    ranks = start(load_recipe(recipe_file, ["run_dir=unused"]))
    for engine_name, source, out in hops:
        recipe = load_recipe(recipe_file, [f"run_dir={out}", f"parallel.engine={engine_name}"])
        _, _, engine, method = assemble(recipe, ranks, Path(out))
        step = restore(engine, method, read_manifest(Path(source)))
        saver = LateSaver(ranks, Path(out), recipe.checkpoints, recipe.parallel.timeout_s)
        about = {"identity": identity(recipe), "world_size": ranks.world_size, "engine": engine_name, "norms": []}
        saver.save(engine, step, method.state(), about)
        run_step(recipe, engine, method, step, recipe.steps or 0, before_update=saver.settle)
        saver.save(engine, step + 1, method.state(), about)
        saver.finish()


if __name__ == "__main__":
    with told():
        main(sys.argv[1], json.loads(sys.argv[2]))

"""Run under torchrun by test_plan_state.py: trains two steps with each engine and says how many bytes it really holds.

Prints one JSON line: for each case the largest number of bytes over ranks, between steps and with gradients.
"""

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shipyard.training.batches import accumulation
from shipyard.training.engine import Engine
from shipyard.training.exit_code import told
from shipyard.training.lora import add_adapters
from shipyard.training.optim import build_optimizer
from shipyard.training.parallel import build_engine
from shipyard.training.ranks import Ranks, start
from shipyard.training.recipe import Recipe, parse_recipe
from transformers import AutoConfig, AutoModelForCausalLM

SMALLEST = 100  # bytes: counters and flags are less, the smallest parameter is more


def recipe_of(case: dict[str, Any], config: str) -> Recipe:
    tree = {
        "method": "sft",
        "steps": 2,
        "model": {"name": "scratch", "shape": config, "dtype": case["dtype"]},
        "data": {"train": "rows.jsonl"},
        "batch": {"size": 2 * case["rounds"] * int(dist.get_world_size() if dist.is_initialized() else 2), "micro": 2},
        "lora": {"rank": case.get("lora", 0)},
        "parallel": {"engine": case["engine"]},
    }
    return parse_recipe(tree)


def allocated(model: torch.nn.Module | None = None) -> int:
    """Bytes of all floating-point storages that this process holds. A gradient that nobody asked for is no Python
    object yet, so the model's are asked for."""
    gc.collect()
    held: dict[int, int] = {}
    gradients = [] if model is None else [p.grad for p in model.parameters() if p.grad is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in [*gc.get_objects(), *gradients]:
            if not issubclass(type(found), torch.Tensor) or not found.is_floating_point():
                continue
            local = found.to_local() if hasattr(found, "to_local") else found
            if local.device.type == "cpu" and local.untyped_storage().nbytes() > SMALLEST:
                held[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(held.values())


def measure(case: dict[str, Any], config: str, ranks: Ranks) -> dict[str, int]:
    recipe = recipe_of(case, config)
    before = allocated()
    tree = json.loads(Path(config).read_text())
    width = torch.float32 if not recipe.lora.rank else getattr(torch, case["dtype"])
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree), dtype=width)
    if recipe.lora.rank:
        model = add_adapters(model, recipe.lora, 0)
    engine = build_engine(ranks, model, build_optimizer(recipe, model), recipe)
    # FSDP2's and ZeRO-3's engines keep the model's form, with rotary tables of its own.
    forms = {model, getattr(engine, "_skeleton", model)}
    buffers = {buffer for form in forms for buffer in form.buffers()}
    tables = sum(buffer.untyped_storage().nbytes() for buffer in buffers)
    rounds = accumulation(recipe.batch.size, recipe.batch.micro, ranks.world_size)
    assert rounds == case["rounds"]
    most: list[int] = []
    for step in range(2):
        for turn in range(rounds):
            backward(engine, last=turn == rounds - 1)
            most.append(allocated(model) if step else 0)
        engine.step(1e-3)
    between = allocated()
    numbers = torch.tensor([between - before - tables, max(most) - between], dtype=torch.int64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    found = {"between": int(numbers[0]), "gradients": int(numbers[1])}
    if isinstance(engine.model, torch.nn.parallel.DistributedDataParallel):
        sizes = str(engine.model._get_ddp_logging_data()["bucket_sizes"])
        found["buckets"] = sum(map(int, sizes.replace(" ", "").split(",")))
    return found


def backward(engine: Engine, last: bool) -> None:
    with engine.micro_batch(last):
        ids = torch.randint(0, 101, (2, 16))
        loss = engine.model(input_ids=ids, use_cache=False).logits.float().pow(2).mean()
        engine.backward(loss, last)


def main() -> None:
    config, cases = sys.argv[1], json.loads(sys.argv[2])
    ranks = start(recipe_of(cases[0], config))
    found = [measure(case, config, ranks) for case in cases]
    if ranks.first:
        print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    with told():
        main()

"""One optimizer step, whatever the method and the engine."""

import math
from collections.abc import Callable

from . import experts
from .engine import Engine
from .health import Evidence, bad_step
from .method import Method
from .optim import learning_rate
from .recipe import Recipe

NOTHING = -1.0
"""A largest norm that no norm keeps to: the engine then discards its gradients."""


def run_step(
    recipe: Recipe,
    engine: Engine,
    method: Method,
    step: int,
    steps: int,
    asked_to_stop: bool = False,
    largest: float = math.inf,
    before_update: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Optimizer step `step` (from 0) of `steps`; return the global numbers. Collective.

    `before_update` is called when the passes are done: up to then no weight and no moment has changed.

    Raises BadStep on every rank, weights and moments untouched, when a loss or the gradient is not a finite number, or
    the gradient's norm is beyond `largest`.
    """
    items = method.batch(step)
    totals = method.totals(items)
    useful = method.useful(items)
    parts: list[dict[str, float]] = []
    tokens = [method.totals([item])["tokens"] for item in useful]
    micro_batches = engine.share(useful, tokens, recipe.batch)
    for number, micro_items in enumerate(micro_batches):
        with engine.micro_batch(last=number == len(micro_batches) - 1):
            loss, numbers = method.loss(engine.model, micro_items, totals)
            engine.backward(loss, last=number == len(micro_batches) - 1)
        flags = {"asked_to_stop": float(asked_to_stop), "bad": float(not math.isfinite(numbers["loss"]))}
        parts.append({**numbers, **flags})
    values = engine.total(parts)
    lr = learning_rate(recipe.optim, step, steps)
    bad = values.pop("bad") > 0
    updates = engine.updates
    before_update()
    norm = engine.step(lr, NOTHING if bad else largest)
    loads = experts.balance(engine.module, engine.ranks, learn=engine.updates > updates)
    if bad or not norm <= largest:
        losses = [part["loss"] for part in parts]
        raise bad_step(recipe, engine.ranks, Evidence(step, items, micro_batches, losses, norm, largest))
    counts = {"tokens": totals["tokens"], "supervised": totals["supervised"]}
    counts["computed"] = method.totals(useful)["tokens"]  # rollouts without use are not run
    first = {"loss": values.pop("loss"), "lr": lr, "grad_norm": norm}
    return {**first, **values, **loads, **method.summary(items), **counts}

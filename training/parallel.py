"""Which engine a recipe asks for."""

import torch
from torch import nn

from .engine import Engine
from .ranks import Ranks
from .recipe import Recipe


def computes_whole(engine: str, tensor: int, context: int, compiled: bool) -> bool:
    """Whether every rank computes whole layers on whole rows, as written, which `kernels: auto` wants for the Triton
    kernels: no two ranks share a layer or a row, and torch.compile traces nothing. Engines that scatter weights bring a
    layer's together before it runs."""
    return tensor == context == 1 and not compiled


def build_engine(ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> Engine:
    """Wrap model and optimizer in the recipe's engine."""
    if recipe.deterministic == "elastic":
        from .elastic import ElasticEngine

        return ElasticEngine(ranks, model, optimizer, recipe)
    if recipe.parallel.engine == "ddp":
        return Engine(ranks, model, optimizer, recipe)
    if recipe.parallel.tensor > 1:
        from .tensor_parallel import TensorEngine

        return TensorEngine(ranks, model, optimizer, recipe)
    if recipe.parallel.engine == "fsdp2":
        from .fsdp2 import ShardedEngine

        return ShardedEngine(ranks, model, optimizer, recipe)
    from .zero import ZeroEngine

    return ZeroEngine(ranks, model, optimizer, recipe)

"""The interface that every parallel engine has, and its simplest form: one process, or DDP.

An engine is given losses that are already divided by the *global* denominator and returns the gradient norm of the
global batch. DDP and DeepSpeed both average over ranks, and DeepSpeed divides by the accumulation too; the engines undo
this, so every engine computes the same sum.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .batches import Item, share
from .context_parallel import neighbours, sharing
from .mesh import device_mesh
from .optim import moment_names, set_learning_rate
from .ranks import Ranks
from .recipe import Batch, Recipe

Read = Callable[[str, str, int, int], Tensor | None]
"""read(name, part, start, length): a flat range of a part of a stored parameter, fp32; None if it has no such part."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one flattened trained parameter, as one rank holds it.

    `tensors` has the range of each part: "value", and the optimizer's own ("exp_avg", "exp_avg_sq"), 1-D, fp32. Over
    all ranks, fragments hold every element of every trained parameter exactly once, whatever the engine. They are views
    of what trains, which nothing writes but the engine's `step` and `load`; where not `live`, copies made to be read.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]
    live: bool = True


class Engine:
    """One process or DDP: torch's optimizer, gradients averaged over ranks by DDP's all-reduce."""

    alike = 1
    """Neighbouring ranks that get the same micro-batches, to share their rows or layers."""

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.ranks = ranks
        self.alike = recipe.parallel.tensor * recipe.parallel.context
        self.mesh = self._mesh(recipe)
        self.neighbours = neighbours(self.mesh, model) if self.mesh and recipe.parallel.context > 1 else None
        self.module = model.to(ranks.device)
        self.model = self._distribute()
        self.optimizer = optimizer
        self.max_grad_norm = recipe.optim.max_grad_norm
        self.autocast = recipe.model.dtype == "bfloat16" and recipe.lora.rank == 0
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.updates = 0
        """Optimizer steps taken, which Adam's bias correction counts: steps that were skipped are not among them."""

    def _mesh(self, recipe: Recipe) -> DeviceMesh | None:
        """The ranks in dimensions, for those who ask."""
        return device_mesh(self.ranks, recipe.parallel) if recipe.parallel.context > 1 else None

    def _distribute(self) -> nn.Module:
        """What the methods call in place of `module`."""
        if self.ranks.world_size == 1:
            return self.module
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.module, device_ids=devices)

    def share(self, items: Sequence[Item], tokens: Sequence[float], batch: Batch) -> list[Sequence[Item]]:
        """This rank's micro-batches of a global batch, at least one, some maybe without items."""
        return share(items, tokens, batch, self.ranks.world_size // self.alike, self.ranks.rank // self.alike)

    def total(self, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Logged numbers of this rank's micro-batches, added up over these and over ranks. Collective.

        Ranks that share rows or layers all have the whole numbers of the same micro-batches.
        """
        total = self.ranks.sum({key: sum(part[key] for part in parts) for key in parts[0]})
        return {key: value / self.alike for key, value in total.items()}

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch, whose loss is already divided by the global denominator."""
        (loss * self.ranks.world_size).backward()

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """The scope of one micro-batch's forward and backward: ranks talk to each other in the last one of a step."""
        with sharing(self.neighbours), contextlib.ExitStack() as scope:
            if isinstance(self.model, nn.parallel.DistributedDataParallel) and not last:
                scope.enter_context(self.model.no_sync())
            if self.autocast:
                scope.enter_context(torch.autocast(self.ranks.device.type, torch.bfloat16))
            yield

    def step(self, lr: float, largest: float = math.inf) -> float:
        """Clip, update, clear; return the global norm before clipping. Collective.

        A norm that is not finite, or beyond `largest`, updates nothing: weights and moments stay as they were.
        """
        norm = self.clip()
        if math.isfinite(norm) and norm <= largest:
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        return norm

    def clip(self) -> float:
        """Scale gradients down to `max_grad_norm`; return their global norm before that. Collective."""
        return float(nn.utils.clip_grad_norm_(self.trainable, self.max_grad_norm))

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """The scope in which `module` holds every weight whole on every rank. Collective."""
        yield

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of what was trained and of the optimizer's state. Nothing is copied.

        Every rank holds everything here, so parameters are spread over ranks by size.
        """
        for name, parameter in share_out(self.named_trainable(), self.ranks):
            state = self.optimizer.state.get(parameter, {})
            parts = {"value": parameter.detach(), **moments(state, parameter)}
            yield Fragment(name, tuple(parameter.shape), 0, {key: part.reshape(-1) for key, part in parts.items()})

    def load(self, read: Read, updates: int) -> None:
        """Set what this rank holds from stored fragments, after `updates` optimizer steps."""
        self.updates = updates
        for name, parameter in self.named_trainable():
            value = read(name, "value", 0, parameter.numel())
            assert value is not None
            parameter.data.copy_(value.view_as(parameter))
            stored = {part: read(name, part, 0, parameter.numel()) for part in self.moment_names(parameter)}
            self.optimizer.state[parameter] = {
                part: tensor.view_as(parameter).to(parameter.device, copy=True)
                for part, tensor in stored.items()
                if tensor is not None
            }
            if self.optimizer.state[parameter]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(updates))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of every trained parameter."""
        return {name: tuple(parameter.shape) for name, parameter in self.named_trainable()}

    def moment_names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The parts, besides the value, that the optimizer keeps of a parameter."""
        return moment_names(self.optimizer, parameter)


def moments(state: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Those tensors of an optimizer's state that have an element for each of the parameter's."""
    return {key: tensor for key, tensor in state.items() if tensor.shape == like.shape and tensor.ndim > 0}


def share_out(named: list[tuple[str, nn.Parameter]], ranks: Ranks) -> list[tuple[str, nn.Parameter]]:
    """This rank's share of parameters that every rank holds whole: the largest first, each to the rank with least."""
    loads = [0] * ranks.world_size
    mine = []
    for name, parameter in sorted(named, key=lambda item: (-item[1].numel(), item[0])):
        rank = loads.index(min(loads))
        loads[rank] += parameter.numel()
        if rank == ranks.rank:
            mine.append((name, parameter))
    return mine

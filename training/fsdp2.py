"""FSDP2 behind the engine interface: every weight, gradient and moment cut by rows over ranks (torch's fully_shard).

Zhao et al. 2023, in its per-parameter form. A block's weights are whole only while the block computes; gradients are
reduce-scattered in fp32 as sums, so losses that are divided by the global denominator stay right.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from .context_parallel import sharing
from .engine import Engine, Fragment, Read, moments
from .mesh import device_mesh
from .models import as_written, blocks
from .ranks import Ranks
from .recipe import Recipe


class ShardedEngine(Engine):
    """FSDP2 with whole weights or adapters, in fp32 or bf16, parameters on the device or offloaded to the host."""

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.offload = recipe.parallel.offload == "cpu"
        self.mixed = recipe.model.dtype == "bfloat16" and recipe.lora.rank == 0
        self._skeleton = without_weights(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        super().__init__(ranks, model, optimizer, recipe)
        self.autocast = False  # the policy casts
        sharded = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]

    def _distribute(self) -> nn.Module:
        mesh = self._cut_layers(cast(DeviceMesh, self.mesh))
        policy = MixedPrecisionPolicy()
        if self.mixed:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.offload else OffloadPolicy()
        for module in (*blocks(self.module), self.module):
            fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
        for module in self._sharded_modules():
            module.set_gradient_divide_factor(1.0)  # FSDP2 divides by the number of ranks
            module.set_force_sum_reduction_for_comms(True)  # gloo knows sums only
        return self.module

    def _mesh(self, recipe: Recipe) -> DeviceMesh:
        return device_mesh(self.ranks, recipe.parallel)

    def _cut_layers(self, mesh: DeviceMesh) -> DeviceMesh:
        """The ranks over which rows of weights are cut; ranks that share tokens share weights too."""
        return mesh["dp_shard_cp"]

    def _sharded_modules(self) -> list[FSDPModule]:
        return [module for module in self.module.modules() if isinstance(module, FSDPModule)]

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        root = cast(FSDPModule, self.module)
        root.set_requires_gradient_sync(last)
        root.set_is_last_backward(last)
        with sharing(self.neighbours):
            yield

    def clip(self) -> float:
        """Scale this rank's rows by the norm over all ranks' rows; fp64 sums. Collective."""
        gradients = [cast(DTensor, p.grad).to_local() for p in self.trainable if p.grad is not None]
        norm = self.ranks.sum({"squares": self._squares()})["squares"] ** 0.5
        torch._foreach_mul_(gradients, min(1.0, self.max_grad_norm / (norm + 1e-6)))
        return norm

    def _squares(self) -> float:
        """This rank's part of the squared norm."""
        gradients = [cast(DTensor, p.grad).to_local() for p in self.trainable if p.grad is not None]
        return sum((gradient.double().square().sum().item() for gradient in gradients), 0.0)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """`module` is then an ordinary model on the first rank; FSDP2's own would gather in its hooks, collectively."""
        weights = {}
        for name, parameter in self.module.named_parameters():
            whole = cast(DTensor, parameter.detach().to(self.ranks.device)).full_tensor()
            if self.ranks.first:
                weights[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        with standing_in(self, self._skeleton, weights):
            yield
        self._skeleton = without_weights(self._skeleton)

    def fragments(self) -> Iterator[Fragment]:
        """Rows are contiguous in a flattened tensor: each parameter's shard is one range."""
        for name, parameter in self.named_trainable():
            start, length = self._range(parameter)
            if length:
                parts = {"value": parameter.detach(), **moments(self.optimizer.state.get(parameter, {}), parameter)}
                local = {part: cast(DTensor, tensor).to_local().reshape(-1) for part, tensor in parts.items()}
                yield Fragment(name, tuple(parameter.shape), start, local)

    def load(self, read: Read, updates: int) -> None:
        self.updates = updates
        for name, parameter in self.named_trainable():
            state: dict[str, Tensor] = {}
            start, length = self._range(parameter)
            for part in ("value", *self.moment_names(parameter)):
                stored = read(name, part, start, length)
                if stored is None:
                    continue
                held = parameter.detach() if part == "value" else torch.zeros_like(parameter).detach()
                local = cast(DTensor, held).to_local()
                local.copy_(stored.view_as(local))
                if part != "value":
                    state[part] = held
            if state:
                state["step"] = torch.tensor(float(updates))
            self.optimizer.state[parameter] = state

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where this rank's rows begin in the flattened parameter, and how many numbers they hold."""
        row = parameter.numel() // parameter.shape[0]
        rows = -(-parameter.shape[0] // self.ranks.world_size)
        length = cast(Any, parameter).to_local().numel()
        return (rows * row * self.ranks.rank if length else 0), length


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters take no memory."""
    hollow = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return as_written(copy.deepcopy(model, memo=cast(dict[int, Any], hollow)))


def put_weights(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Replace parameters by name; one that several modules share stays shared."""
    replaced = {id(parameter): weights[name] for name, parameter in model.named_parameters()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = replaced[id(parameter)]


@contextlib.contextmanager
def standing_in(engine: Engine, form: nn.Module, weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """The scope in which the first rank's `engine.module` is `form` with whole `weights` and the engine's buffers."""
    scattered = engine.module
    if engine.ranks.first:
        put_weights(form, weights)
        for stale, buffer in zip(form.buffers(), scattered.buffers(), strict=True):
            stale.copy_(buffer)
        engine.module = form.to(engine.ranks.device)
    try:
        yield
    finally:
        engine.module = scattered

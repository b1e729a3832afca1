"""Tensor parallel behind the engine interface: ranks in a row share each layer's matrices, FSDP2 cuts what is left.

Shoeybi et al. 2019 (Megatron-LM): the first matrices of a block are cut by columns, the last one by rows, so a block
sums its output over the row's ranks once. transformers says which matrix is cut how (`base_model_tp_plan`), torch's
`parallelize_module` cuts. The mesh is the one of Accelerate's ParallelismConfig: data-parallel groups outside, tensor-
parallel neighbours inside. Ranks of a row compute the same micro-batches, so data-parallel groups count as ranks do
elsewhere.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from .engine import Fragment, Read, moments
from .fsdp2 import ShardedEngine
from .ranks import Ranks
from .recipe import Recipe


class TensorEngine(ShardedEngine):
    """FSDP2 over groups of `parallel.tensor` ranks that share every layer. Whole weights, AdamW."""

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.row = recipe.parallel.tensor
        self.group, self.place = divmod(ranks.rank, self.row)
        _refuse_what_cannot_be_cut(ranks, model, self.row)
        super().__init__(ranks, model, optimizer, recipe)
        for group in list(optimizer.param_groups):  # one call of AdamW cannot mix meshes
            cut = [p for p in group["params"] if self._cut(p) is not None]
            whole = [p for p in group["params"] if self._cut(p) is None]
            if cut and whole:
                group["params"] = cut
                optimizer.add_param_group({**group, "params": whole})

    def _cut_layers(self, mesh: DeviceMesh) -> DeviceMesh:
        self.sharers = mesh["tp"].get_group()
        parallelize_module(self.module, mesh["tp"], plan(self.module))
        return mesh["dp_shard_cp"]

    def _squares(self) -> float:
        """What is not cut lies on every rank of a row; the first one counts it."""
        mine = [p for p in self.trainable if p.grad is not None and (self._cut(p) is not None or self.place == 0)]
        gradients = [cast(DTensor, p.grad).to_local() for p in mine]
        return sum((gradient.double().square().sum().item() for gradient in gradients), 0.0)

    def fragments(self) -> Iterator[Fragment]:
        """Rows of what is cut by columns are put together among neighbours first, each of which keeps some of them."""
        for name, parameter in self.named_trainable():
            parts = {"value": parameter.detach(), **moments(self.optimizer.state.get(parameter, {}), parameter)}
            start, rows = self._rows(parameter)
            local = {part: self._whole_rows(parameter, cast(DTensor, held).to_local()) for part, held in parts.items()}
            if self._cut(parameter) == 1:
                first, last = (rows * place // self.row for place in (self.place, self.place + 1))
                start, rows = start + first, last - first
                local = {part: tensor[first:last] for part, tensor in local.items()}
            elif self._cut(parameter) is None and self.place:
                continue
            if rows:
                width = parameter.numel() // parameter.shape[0]
                flat = {part: tensor.reshape(-1) for part, tensor in local.items()}
                live = self._cut(parameter) != 1  # what was put together is a copy, on the device
                yield Fragment(name, tuple(parameter.shape), start * width, flat, live)

    def load(self, read: Read, updates: int) -> None:
        self.updates = updates
        for name, parameter in self.named_trainable():
            state: dict[str, Tensor] = {}
            start, rows = self._rows(parameter)
            width = parameter.numel() // parameter.shape[0]
            for part in ("value", *self.moment_names(parameter)):
                stored = read(name, part, start * width, rows * width)
                if stored is None:
                    continue
                held = parameter.detach() if part == "value" else torch.zeros_like(parameter).detach()
                local = cast(DTensor, held).to_local()
                whole = stored.view(rows, *parameter.shape[1:])
                local.copy_(whole.chunk(self.row, dim=1)[self.place] if self._cut(parameter) == 1 else whole)
                if part != "value":
                    state[part] = held
            if state:
                state["step"] = torch.tensor(float(updates))
            self.optimizer.state[parameter] = state

    def _cut(self, parameter: nn.Parameter) -> int | None:
        """The dimension that a row's ranks share of a parameter; None if each holds what its group holds."""
        placements = cast(Any, parameter).placements
        return placements[-1].dim if len(placements) > 1 else None

    def _rows(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The first of this rank's rows, and how many: a neighbour's share is cut again over groups."""
        rows, groups = parameter.shape[0], self.ranks.world_size // self.row
        begin = 0
        if self._cut(parameter) == 0:
            rows //= self.row
            begin = rows * self.place
        each = -(-rows // groups)
        return begin + min(rows, each * self.group), cast(DTensor, parameter).to_local().shape[0]

    def _whole_rows(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        if self._cut(parameter) != 1:
            return local
        pieces = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(self.row)]
        dist.all_gather(pieces, local.contiguous(), group=self.sharers)
        return torch.cat(pieces, dim=1)


def plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """How each matrix is cut, in torch's words, from transformers' plan. A head tied to the embedding stays whole."""
    styles: dict[str, ParallelStyle] = {}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for name, word in (cast(Any, model).tp_plan or {}).items():
        if word == "colwise":
            styles[name] = ColwiseParallel()
        elif word == "rowwise":
            styles[name] = RowwiseParallel()
        elif word == "colwise_gather_output" and not tied:
            styles[name] = ColwiseParallel(output_layouts=Replicate())
    return styles


def _refuse_what_cannot_be_cut(ranks: Ranks, model: nn.Module, row: int) -> None:
    """Raises ValueError, one line, for a model or a number of ranks that rows of `row` ranks cannot share."""
    config = cast(Any, model).config
    if ranks.world_size % row:
        raise ValueError(
            f"parallel.tensor: {row} ranks share a layer, but {ranks.world_size} are no multiple of that; start "
            f"{-(-ranks.world_size // row) * row}"
        )
    words = set((cast(Any, model).tp_plan or {}).values())
    if odd := sorted(words - {"colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"}):
        raise ValueError(
            f"parallel.tensor: {config.model_type} has layers that are cut as {odd[0]!r}, which does not hold here; "
            "set parallel.tensor: 1"
        )
    if not words:
        raise ValueError(f"parallel.tensor: no plan is known for {config.model_type}; set parallel.tensor: 1")
    sizes = {"num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size", "vocab_size"}
    for name in sorted(sizes):
        if getattr(config, name, row) % row:
            raise ValueError(
                f"parallel.tensor: {row} ranks cannot share {getattr(config, name)} {name} evenly; set a divisor of it"
            )

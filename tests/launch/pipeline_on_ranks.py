"""Run under torchrun by test_plan_pipeline.py: trains two steps in a pipeline of fully sharded stages and says how many
bytes each rank holds after each of its actions, by what holds them.

Prints one JSON line: for each case and rank, a list of moments in the order of the rank's schedule.
"""

import gc
import json
import sys
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from saved_for_tests import real_model
from shipyard.launch.footprint import Pass
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

TOKENS = 48
SMALLEST = 100  # bytes: an optimizer's counters are less, the smallest parameter is more


class Storages(TorchDispatchMode):
    """Every storage that was made while this was on and is alive, and the most bytes that were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.saved = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.given: set[int] = set()
        """Not counted: the batch, and tables that are made once."""
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, made)):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.bytes())
        return made

    def add(self, tensor: Tensor) -> None:
        self.alive[_local(tensor).untyped_storage()] = True

    def save(self, tensor: Tensor) -> Tensor:
        """As a hook on what autograd saves."""
        self.saved[_local(tensor).untyped_storage()] = True
        return tensor

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.alive if id(storage) not in self.given)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Piece(nn.Module):
    """Some of a Llama's blocks, with its ends on the first and last piece."""

    def __init__(self, model: Any, first: int, count: int) -> None:
        super().__init__()
        whole = model.model
        self.embed = whole.embed_tokens if first == 0 else None
        self.layers = nn.ModuleList(whole.layers[first : first + count])
        last = first + count == len(whole.layers)
        self.norm = whole.norm if last else None
        self.head = model.lm_head if last else None
        cos, sin = whole.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), torch.arange(TOKENS)[None])
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, given: Tensor) -> Tensor:
        hidden_BTD = given if self.embed is None else self.embed(given)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, position_embeddings=(self.cos, self.sin))
        if self.norm is None or self.head is None:
            return hidden_BTD
        return self.head(self.norm(hidden_BTD))


class Watched(PipelineStage):
    """A stage that notes what its rank holds after each action."""

    def watch(self, action: str) -> None:
        """Replaced when the steps to be watched begin."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self.watch(f"F{self.stage_index}.{fwd_chunk_id}")
        return out

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self.watch(f"B{self.stage_index}.{bwd_chunk_id}")

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        super().perform_reduce_grad(grad_scale_factor)
        self.watch(f"R{self.stage_index}")


def loss_of(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def measure(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Moments of the second step; the first one makes the optimizer's state and asks each stage for its shapes."""
    torch.manual_seed(0)
    pipeline, rounds = case["pipeline"], case["rounds"]
    mesh = init_device_mesh("cpu", (pipeline, dist.get_world_size() // pipeline), mesh_dim_names=("pp", "dp"))
    rank, split = mesh["pp"].get_local_rank(), case["split"]
    storages = Storages()
    model = real_model(Pass(case["config"], 1, TOKENS, case["checkpointing"], dtype="float32"), sum(split))
    stages = [_stage(model, split, index, mesh) for index in range(rank, len(split), pipeline)]
    del model
    for tensor in (tensor for stage in stages for tensor in (*stage.submod.parameters(), *stage.submod.buffers())):
        storages.add(tensor)
    optimizers = [torch.optim.AdamW(stage.submod.parameters()) for stage in stages]
    plain = len(stages) == 1
    schedule: Any = (
        Schedule1F1B(stages[0], rounds, loss_of)
        if plain
        else ScheduleInterleaved1F1B(cast(Any, stages), rounds, loss_of)
    )
    ids_BT = torch.randint(0, 101, (rounds * case["micro"], TOKENS))
    moments: list[dict[str, Any]] = []

    def step() -> None:
        given = (ids_BT,) if rank == 0 else ()
        schedule.step(*given, target=ids_BT if rank == pipeline - 1 else None)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def watch(action: str) -> None:
        moments.append({"action": action, "peak": storages.peak, **held(stages, storages)})
        storages.peak = 0

    with storages:
        step()
        gc.collect()
        tables = [table for stage in stages for table in stage.submod.buffers()]
        storages.given = {id(tensor.untyped_storage()) for tensor in (ids_BT, *tables)}
        for stage in stages:
            stage.watch = watch
        with torch.autograd.graph.saved_tensors_hooks(storages.save, lambda tensor: tensor):
            step()
    return moments


def _stage(model: Any, split: list[int], index: int, mesh: Any) -> Watched:
    """As torchtitan shards a stage: each block and the whole, gathered until the step's last backward pass."""
    piece = Piece(model, sum(split[:index]), split[index])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*piece.layers, piece):
        fully_shard(part, mesh=mesh["dp"], mp_policy=policy, reshard_after_forward=False)
    return Watched(piece, index, len(split), torch.device("cpu"), group=mesh.get_group("pp"))


def held(stages: list[Watched], storages: Storages) -> dict[str, int]:
    """Bytes by holder; a storage counts for the first of them. `state` is all that no other holds."""
    seen = set(storages.given)

    def size(tensors: Any) -> int:
        found = {id(s): s.nbytes() for t in tensors if isinstance(t, Tensor) for s in [_local(t).untyped_storage()]}
        new = {key: count for key, count in found.items() if key not in seen}
        seen.update(new)
        return sum(new.values())

    weights = size(tensor for stage in stages for tensor in stage.submod.parameters())
    received = [
        info.buffer
        for stage in stages
        for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values())
        for info in infos
    ]
    outputs = [t for stage in stages if not stage.is_last for kept, _ in stage.fwd_cache.values() for t in kept]
    between = size((*received, *outputs))
    logits = size(logits for stage in stages for logits in stage.output_chunks)
    saved = sum(storage.nbytes() for storage in storages.saved if id(storage) not in seen)
    seen.update(id(storage) for storage in storages.saved)
    rest = sum(s.nbytes() for s in storages.alive if id(s) not in seen and s.nbytes() > SMALLEST)
    return {"saved": saved, "between": between, "logits": logits, "state": weights + rest}


def main() -> None:
    dist.init_process_group("gloo")
    for case in json.loads(sys.argv[1]):
        moments: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(moments, measure(case))
        if dist.get_rank() == 0:
            print("FOUND " + json.dumps(moments))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

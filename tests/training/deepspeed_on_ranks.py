"""Run under torchrun by test_deepspeed_files.py: real DeepSpeed engines save and load, and say what they hold.

deepspeed_on_ranks.py stages OUT               each stage saves; its export is loaded by the next stage
deepspeed_on_ranks.py pass MODEL UNIVERSAL OUT  ZeRO-3 loads MODEL's state from UNIVERSAL and saves it into OUT
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from shipyard.training.deepspeed_files import export_deepspeed, import_deepspeed
from shipyard.training.exit_code import told
from shipyard.training.experts import BIAS
from torch import nn


class Odd(nn.Module):
    """Sizes that no number of ranks divides, two groups of parameters, frozen weights, and a router's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.gate = nn.Identity()
        self.gate.register_buffer(BIAS, torch.zeros(4))

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.second(self.norm(self.first(x_BI)))).pow(2).sum()


def start(model: nn.Module, stage: int, universal: bool) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    return engine


def held(engine: Any, path: Path) -> None:
    """Write all that the engine holds, as DeepSpeed's own functions tell it."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # else a later group's moments are not found
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = {part: safe_get_full_optimizer_state(parameter, part) for part in ("exp_avg", "exp_avg_sq")}
        for part, tensor in {"value": safe_get_full_fp32_param(parameter), **moments}.items():
            assert tensor is not None, (part, name)
            tensors[f"{part}/{name}"] = tensor.detach().clone()
    steps = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    assert len(steps) == 1, steps
    tensors |= {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    tensors["steps"] = torch.tensor([steps.pop(), engine.global_steps])
    if dist.get_rank() == 0:
        save_file(tensors, path)


def train(engine: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(10 * step + dist.get_rank())
        engine.backward(engine(torch.randn(4, 7)))
        engine.step()


def stages(out: Path) -> None:
    for stage in (1, 2, 3):
        torch.manual_seed(0)
        engine = start(Odd(), stage, universal=False)
        train(engine, range(3))
        engine.module.gate.get_buffer(BIAS).copy_(torch.tensor([0.003, -0.001, 0.002, -0.004]) * stage)
        engine.save_checkpoint(str(out / f"zero{stage}"))
        held(engine, out / f"zero{stage}.safetensors")
        if dist.get_rank() == 0:
            step = import_deepspeed(out / f"zero{stage}", out / f"run{stage}")
            export_deepspeed(step, out / f"universal{stage}")
        dist.barrier()
        torch.manual_seed(0)  # the frozen weights are not in a checkpoint of ours
        other = start(Odd(), 1 + stage % 3, universal=True)
        other.load_checkpoint(str(out / f"universal{stage}"))
        (states,) = (out / f"universal{stage}").glob("*/mp_rank_00_model_states.pt")
        saved = torch.load(states, weights_only=True)
        other.module.load_state_dict({name: saved["module"][name] for name in saved["buffer_names"]}, strict=False)
        held(other, out / f"loaded{stage}.safetensors")
        # ZeRO-3 of DeepSpeed 0.19 gives all groups one and the same count, which each then counts up.
        for state in other.optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
        train(engine, range(3, 4))
        train(other, range(3, 4))
        held(engine, out / f"next{stage}.safetensors")
        held(other, out / f"loaded-next{stage}.safetensors")
        dist.barrier()


def through(model: str, universal: str, out: str) -> None:
    from transformers import AutoModelForCausalLM

    engine = start(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), 3, universal=True)
    engine.load_checkpoint(universal)
    engine.save_checkpoint(out)


if __name__ == "__main__":
    with told():
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        if sys.argv[1] == "stages":
            stages(Path(sys.argv[2]))
        else:
            through(*sys.argv[2:])
        dist.barrier()

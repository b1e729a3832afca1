"""One clock for every trainer: torch calls it after each optimizer step, whoever wrote the loop around it.

Needs torch alone, so that a trainer in an environment of its own is measured by the same lines.
"""

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook


class Meter:
    """Counts the tokens that enter the model and takes the time at the end of every optimizer step.

    A step lasts from the end of the one before it, so fetching data, logging and all else a loop does is inside. The
    first step pays for warming up, and starts the clock. `file` is written anew after every step; when `enough(tokens)`
    (real tokens of each step so far) says so, `stop` is called.
    """

    def __init__(self, file: Path, padding_id: int, enough: Callable[[list[int]], bool], stop: Callable[[], Any]):
        self.file, self.padding_id, self.enough, self.stop = file, padding_id, enough, stop
        self.steps: list[dict[str, float]] = []
        self.real: list[int] = []
        self.tokens = self.computed = 0
        register_module_forward_pre_hook(self._entering)
        register_optimizer_step_post_hook(self._stepped)

    def _entering(self, module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Embedding) and torch.is_grad_enabled():  # validation is not training
            self.computed += inputs[0].numel()
            self.tokens += int((inputs[0] != self.padding_id).sum())

    def _stepped(self, optimizer: Any, arguments: Any, named: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the step is over when the card says so
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.real.append(self.tokens)
        self.steps.append(
            {
                "at_s": time.perf_counter(),
                "cpu_s": usage.ru_utime + usage.ru_stime,
                "memory_gib": peak_bytes(usage.ru_maxrss * 1024) / 2**30,
                "tokens": self.tokens,
                "computed": self.computed,
            }
        )
        self.tokens = self.computed = 0
        self.file.write_text(json.dumps(self.steps), encoding="utf-8")
        if self.enough(self.real):
            self.stop()


def peak_bytes(process: int) -> int:
    """The high-water mark of what is scarce: the card's memory where there is one, as its allocator reserved it."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else process


def leave() -> None:
    """End this process at once: what a trainer does after its last step is not measured."""
    os._exit(0)

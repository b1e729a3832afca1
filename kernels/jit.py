"""The one place that imports Triton, so that every kernel module also imports on a machine without it.

Kernels are written `@jit` and use `tl`. `use_triton(tensor)` decides between a kernel and its PyTorch reference: a
kernel runs on a GPU tensor, and on a CPU tensor when the process was started with TRITON_INTERPRET=1.
"""

import importlib.metadata
import importlib.util
import math
import os
import struct
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
NEWER = HAS_TRITON and tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 8)
"""A Triton after the one that torch 2.13 brings: its compiler spills where that one does not."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if TYPE_CHECKING:
    import triton.language as tl

    jit: Any = None
elif HAS_TRITON:
    import triton
    import triton.language as tl

    jit = partial(triton.jit, do_not_specialize=("documents",))  # each batch has another number of them
    if INTERPRETED:
        from .interpreter import install

        install()
else:
    tl = SimpleNamespace(constexpr=object, float32=None, float64=None)
    jit = lambda fn: fn


def use_triton(tensor: torch.Tensor) -> bool:
    """True where the Triton kernel runs: on a GPU with Triton installed, or under Triton's interpreter."""
    return HAS_TRITON and (INTERPRETED or tensor.is_cuda)


def need_triton(device: torch.device) -> None:
    """Says in one line why a kernel that was asked for by name cannot run here."""
    if not HAS_TRITON:
        raise ValueError("kernels: triton, is not installed; pip install 'shipyard-llm[kernels]' or use kernels: auto")
    if not (INTERPRETED or device.type == "cuda"):
        raise ValueError(f"kernels: triton, needs a GPU but the weights are on {device}; use kernels: auto")


def need_compiler() -> None:
    """Says in one line why nothing can be compiled ahead of time here."""
    if not HAS_TRITON:
        raise ValueError("datasheet: triton, is not installed; pip install 'shipyard-llm[kernels]'")
    if INTERPRETED:
        raise ValueError("datasheet: TRITON_INTERPRET=1, leaves nothing to compile; unset it")


def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942` ...; the interpreter answers as an H100 would, so that it runs what the H100 runs."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def fits_box(tensor: torch.Tensor) -> bool:
    """Whether Hopper's copy engine can read a tensor in place: dense rows, everything else by multiples of 16 bytes."""
    steps = (*tensor.stride()[:-1], tensor.storage_offset())
    even = all(step * tensor.element_size() % 16 == 0 for step in steps)
    return even and tensor.stride(-1) == 1 and min(tensor.stride()) > 0


def box_of(x_SGD: torch.Tensor, rows: int) -> Any:
    """What a kernel needs to have that engine bring `rows` rows of one head at a time, from [head, first row, 0]."""
    if not HAS_TRITON:  # the planner counts launches without it
        return x_SGD
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x_SGD.transpose(0, 1), [1, rows, x_SGD.shape[2]])


def next_power_of_2(count: int) -> int:
    """Smallest power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def cdiv(count: int, step: int) -> int:
    """Ceiling division."""
    return -(-count // step)


def is_exact(dtype: torch.dtype) -> bool:
    """Whether a result's last bits matter; what is rounded to half a word needs no sums of what rounding lost."""
    return dtype in (torch.float32, torch.float64)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which a kernel and its reference add up: fp64 for fp64 (tests), else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_type(dtype: torch.dtype) -> Any:
    """`wide_type` in Triton's words."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def exponent(dtype: torch.dtype, factor: float = 1.0) -> dict[str, Any]:
    """Arguments that make `raise_two` e ** (factor * x): a factor to base 2, what fp32 loses of it, whether last bits
    matter (where the result is rounded to half a word they do not), and the type."""
    c = factor / math.log(2.0)
    low = c - struct.unpack("f", struct.pack("f", c))[0] if dtype == torch.float32 else 0.0
    return dict(C=c, C_LOW=low, EXACT=is_exact(dtype), COMPUTE=compute_type(dtype))

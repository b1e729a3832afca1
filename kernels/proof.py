"""`shipyard verify kernels`: accuracy, memory faults and bitwise laws of every kernel, under the faithful interpreter.

`python -m shipyard.kernels.proof` with TRITON_INTERPRET=1 prints a line of JSON for each kernel and dtype; `prove`
starts that process and reads it. The laws are pairs of results that must be the same bits. Without TRITON_INTERPRET it
runs on this machine's GPU: the same errors and laws, on longer documents, from what the card's own compiler made; who
reads or writes where it should not is the interpreter's to find.

Shape suffixes: T tokens, H query heads, G key heads, D width, V vocabulary rows.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from triton.runtime.interpreter import InterpreterError

from .accuracy import MAX_BAR, RMS_BAR, CardProducts, error_ratios, run_all_ways
from .attention import Tile, attention_reference, flash_attention
from .decode import decode_attention, decode_reference
from .interpreter import Sanitizer, poisoned
from .jit import INTERPRETED
from .linear_cross_entropy import reference_log_probs, token_log_probs
from .rms_norm import rms_norm, rms_norm_reference
from .rope import inverse_frequencies, rope, rope_reference, rope_tables
from .shipped import WIDTHS
from .swiglu import swiglu, swiglu_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SCALE = 1 if INTERPRETED else 16  # a card is faster, and has work for more programs than one
LENGTHS = tuple(SCALE * length for length in (40, 0, 17, 64))  # the documents of a pack
Pairs = Iterator[tuple[str, list[torch.Tensor], list[torch.Tensor]]]


@dataclass(frozen=True)
class Subject:
    """A kernel beside its reference. `laws` yields what a law says and the two sides of it."""

    name: str
    sample: Callable[[torch.dtype], list[torch.Tensor]]
    mine: Callable[..., Any]
    reference: Callable[..., Any]
    laws: Callable[[torch.dtype], Pairs]
    backward: bool = True


@dataclass(frozen=True)
class Verdict:
    """What the proof found about one kernel in one dtype; ratios are errors over eager PyTorch's."""

    where: str
    kernel: str
    dtype: str
    rms: float
    largest: float
    faults: tuple[str, ...]
    laws: int
    broken: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return self.rms <= RMS_BAR and self.largest <= MAX_BAR and not self.faults and not self.broken


def examine(subject: Subject, dtype: torch.dtype) -> Verdict:
    """Runs everything about one kernel in one dtype."""
    kind = str(dtype).removeprefix("torch.")
    with Sanitizer() if INTERPRETED else nullcontext(Sanitizer()) as report:
        try:
            results = run_all_ways(subject.mine, subject.reference, subject.sample(dtype), backward=subject.backward)
        except InterpreterError as error:  # an access out of bounds is not carried out
            return Verdict(
                where(), subject.name, kind, math.inf, math.inf, tuple(report.faults[:4] or [str(error)]), 0, ()
            )
    faults = list(report.faults)
    unwritten = poisoned if INTERPRETED else torch.isnan  # what `torch.empty` then holds, see below
    faults += [f"result {i} has elements that nobody wrote" for i, x in enumerate(results[0]) if unwritten(x).any()]
    mine, eager, exact = results
    ratios = list(error_ratios(f"{subject.name} {dtype}", mine, eager, exact))
    laws = [(law, len(a) == len(b) and all(map(torch.equal, a, b))) for law, a, b in subject.laws(dtype)]
    return Verdict(
        where(), subject.name, kind, max(r.rms for r in ratios), max(r.largest for r in ratios), tuple(faults[:4]),
        len(laws), tuple(law for law, holds in laws if not holds),
    )  # fmt: skip


def where() -> str:
    """The name of the card that computes here; or that none does."""
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name()


def with_gradients(function: Callable[..., Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs and input gradients; what comes back down depends on each output element alone."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with CardProducts():
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        seeds = [torch.sin(o.detach().float()).to(o.dtype) for o in outs]
        return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, seeds)]


def borders(lengths: list[int] | tuple[int, ...]) -> torch.Tensor:
    """cu_seqlens of these documents."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def _random(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


# -- attention --------------------------------------------------------------------------------------------------------


def attention_subject(
    name: str, width: int, sinks: bool, options: dict[str, Any], value_width: int | None = None
) -> Subject:
    """Packed causal attention, two query heads on one key head; `options` go to both sides."""
    tokens = sum(LENGTHS)
    shapes = [(tokens, 2, width), (tokens, 1, width), (tokens, 1, value_width or width), *([(2,)] if sinks else [])]

    def mine(q, k, v, sinks_H=None, cu=borders(LENGTHS), tile=None):
        return flash_attention(q, k, v, cu, sinks_H=sinks_H, tile=tile, **options)

    def reference(q, k, v, sinks_H=None):
        return attention_reference(q, k, v, borders(LENGTHS), sinks_H=sinks_H, **options)

    def laws(dtype: torch.dtype) -> Pairs:
        tile = Tile(32, 16, 4, 1)  # documents meet inside tiles
        run = lambda parts, lengths: with_gradients(
            lambda *leaves: mine(*leaves, *rest, cu=borders(lengths), tile=tile), parts
        )
        inputs, rest = _random(dtype, *shapes[:3]), _random(dtype, *shapes[3:])
        ends = borders(LENGTHS).tolist()
        part = lambda x, i: x[ends[i] : ends[i + 1]]
        whole, order = run(inputs, LENGTHS), [3, 1, 0, 2]
        yield "two runs agree", whole, run(inputs, LENGTHS)
        turned = run([torch.cat([part(x, i) for i in order]) for x in inputs], [LENGTHS[i] for i in order])
        yield "permuted documents", turned, [torch.cat([part(x, i) for i in order]) for x in whole]
        alone = [run([part(x, i) for x in inputs], [LENGTHS[i]]) for i in range(len(LENGTHS)) if LENGTHS[i]]
        yield "a document alone", [torch.cat(parts) for parts in zip(*alone, strict=True)], whole
        q, k, v = (part(x, 3) for x in inputs)
        done = []
        for start, end in itertools.pairwise((0, 20 * SCALE, 20 * SCALE + 1, LENGTHS[3])):
            cu, cu_k = borders([end - start]), borders([end])
            done.append(flash_attention(q[start:end], k[:end], v[:end], cu, cu_seqlens_k=cu_k, tile=tile,
                                        sinks_H=rest[0] if rest else None, **options))  # fmt: skip
        yield "prefill in chunks", [torch.cat(done)], [part(whole[0], 3)]

    return Subject(name, lambda dtype: _random(dtype, *shapes), mine, reference, laws)


# -- decode -----------------------------------------------------------------------------------------------------------


def decode_subject() -> Subject:
    """Five sequences in shuffled pages of 16 slots; entries of the table that are not used point nowhere."""
    lengths = SCALE * torch.tensor([70, 600, 0, 5, 256], dtype=torch.int32, device=DEVICE)
    need = [-(-int(length) // 16) for length in lengths]
    order = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(1))
    table = torch.full((len(need), max(need) + 1), 2**30, dtype=torch.int32)
    for row, count in enumerate(need):
        table[row, :count], order = order[:count].to(torch.int32), order[count:]
    table = table.to(DEVICE)
    shapes = [(len(need), 6, 64), *[(sum(need) + 3, 16, 2, 64)] * 2]

    def laws(dtype: torch.dtype) -> Pairs:
        q, k, v = _random(dtype, *shapes)
        whole = decode_attention(q, k, v, table, lengths)
        yield "two runs agree", [decode_attention(q, k, v, table, lengths)], [whole]
        turn = [3, 0, 4, 1, 2]
        yield "permuted batch", [decode_attention(q[turn], k, v, table[turn], lengths[turn])], [whole[turn]]
        wide = torch.cat([table, table], 1)
        rows = [slice(row, row + 1) for row in range(len(need))]
        alone = [decode_attention(q[row], k, v, wide[row], lengths[row]) for row in rows]
        yield "a sequence alone", [torch.cat(alone)], [whole]
        moved = torch.randperm(k.shape[0], generator=torch.Generator().manual_seed(2))
        place = torch.empty_like(moved).index_copy_(0, moved, torch.arange(len(moved)))
        moved, place = moved.to(DEVICE), place.to(DEVICE)
        elsewhere = torch.where(table < 2**30, place[table.clamp(max=len(moved) - 1).long()], 2**30).to(torch.int32)
        yield "pages elsewhere", [decode_attention(q, k[moved], v[moved], elsewhere, lengths)], [whole]

    return Subject(
        "decode", lambda dtype: _random(dtype, *shapes), lambda q, k, v: decode_attention(q, k, v, table, lengths),
        lambda q, k, v: decode_reference(q, k, v, table, lengths), laws, backward=False,
    )  # fmt: skip


# -- token by token ---------------------------------------------------------------------------------------------------


def rope_subject(interleaved: bool) -> Subject:
    """Two rows of packed documents, the tables made from restarting positions, 48 of 64 dimensions turned."""
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in LENGTHS])[None].expand(2, -1)
    cos, sin = rope_tables(positions, inverse_frequencies(48, 10000.0)[0])
    tokens = positions.shape[1]
    shapes = [(2, tokens, 4, 64), (2, tokens, 2, 64)]

    def laws(dtype: torch.dtype) -> Pairs:
        run = lambda parts, at=slice(None), rows=slice(None): with_gradients(
            lambda q, k: rope(q, k, cos[rows, at], sin[rows, at], interleaved), parts
        )
        inputs = _random(dtype, *shapes)
        whole, ends = run(inputs), borders(LENGTHS).tolist()
        yield "two runs agree", run(inputs), whole
        yield "permuted batch", run([x.flip(0) for x in inputs]), [x.flip(0) for x in whole]
        document = slice(ends[3], ends[4])
        yield "a document alone", run([x[:, document] for x in inputs], document), [x[:, document] for x in whole]
        parts = [slice(0, 20), slice(20, 21), slice(21, tokens)]
        done = [run([x[:, part] for x in inputs], part) for part in parts]
        yield "prefill in chunks", [torch.cat(pieces, 1) for pieces in zip(*done, strict=True)], whole

    return Subject(
        f"rope {'interleaved' if interleaved else 'NeoX'}", lambda dtype: _random(dtype, *shapes),
        lambda q, k: rope(q, k, cos, sin, interleaved), lambda q, k: rope_reference(q, k, cos, sin, interleaved), laws,
    )  # fmt: skip


def rows_subject(name: str, shapes: list[tuple[int, ...]], rowwise: int, mine, reference, backward_law=True) -> Subject:
    """A kernel whose rows know nothing of each other: inputs and results before `rowwise` have one row a token."""

    def laws(dtype: torch.dtype) -> Pairs:
        inputs = _random(dtype, *shapes)
        weights, rows = inputs[rowwise:], inputs[:rowwise]
        tokens = rows[0].shape[0]

        def run(index):
            if not backward_law:
                out = mine(*(x[index] for x in rows), *weights, index=index)
                return [*(out if isinstance(out, tuple) else (out,))]
            return with_gradients(lambda *leaves: mine(*leaves, *weights, index=index), [x[index] for x in rows])

        everything = torch.arange(tokens, device=DEVICE)
        whole, turn = run(everything), torch.randperm(tokens, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        yield "permuted rows", run(turn), [x[turn] for x in whole]
        done = [run(part) for part in (everything[:20], everything[20:21], everything[21:])]
        yield "rows in chunks", [torch.cat(pieces) for pieces in zip(*done, strict=True)], whole
        full = lambda: with_gradients(mine, inputs)
        yield "two runs agree", full(), full()

    return Subject(name, lambda dtype: _random(dtype, *shapes), mine, reference, laws)


def every_width() -> Iterator[Subject]:
    """Attention in the tiles of the other widths: the interpreter needs minutes for what a card does in a moment."""
    for width, value_width in WIDTHS:
        if width != 128:
            yield attention_subject(f"attention {width}/{value_width}", width, False, {}, value_width)
        if width > 64:
            options = {"window": 100, "softcap": 5.0}
            yield attention_subject(f"attention {width}/{value_width}, all features", width, True, options, value_width)


def subjects() -> list[Subject]:
    """Every kernel that ships."""
    rows = 130 * SCALE
    targets = torch.randint(0, 300, (rows,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    targets[1::5] = -100
    tokens = lambda index: targets if index is None else targets[index]
    return [
        attention_subject("attention", 128, False, {}),
        attention_subject("attention, all features", 64, True, {"window": 30, "softcap": 5.0}),
        *(() if INTERPRETED else every_width()),
        decode_subject(),
        rope_subject(False),
        rope_subject(True),
        rows_subject("rms_norm", [(rows, 192), (192,)], 1, lambda x, w, index=None: rms_norm(x, w, 1e-6),
                     lambda x, w: rms_norm_reference(x, w, 1e-6)),
        rows_subject("rms_norm, residual", [(rows, 192), (rows, 192), (192,)], 2,
                     lambda x, r, w, index=None: rms_norm(x, w, 1e-6, r),
                     lambda x, r, w: rms_norm_reference(x, w, 1e-6, r)),
        rows_subject("swiglu", [(rows, 100), (rows, 100)], 2, lambda g, u, index=None: swiglu(g, u), swiglu_reference),
        # its backward pass ends in cuBLAS's products, which promise no order: the law is the forward pass's
        rows_subject("linear_cross_entropy", [(rows, 96), (300, 96)], 1,
                     lambda x, w, index=None: token_log_probs(x, w, tokens(index)),
                     lambda x, w: reference_log_probs(x, w, targets), backward_law=False),
    ]  # fmt: skip


def prove(hear: Callable[[Verdict], None], kernels: Sequence[str] = (), card: bool = False) -> bool:
    """Runs the proof in a process of its own, since Triton must know the interpreter before its first import.

    `kernels` names those to prove; none means all. `hear` gets each verdict as it comes. `card`: on the GPU.
    """
    command = [sys.executable, "-m", "shipyard.kernels.proof", *kernels]
    environment = dict(os.environ, TRITON_INTERPRET="0" if card else "1", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    holds = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            row = json.loads(line)
            row |= {name: tuple(row[name]) for name in ("faults", "broken")}
            verdict = Verdict(**row)
            holds.append(verdict.holds)
            hear(verdict)
    if process.returncode:
        raise RuntimeError(f"the proof of the kernels died with exit code {process.returncode}")
    return bool(holds) and all(holds)


if __name__ == "__main__":
    if not INTERPRETED:  # `torch.empty` then gives NaN, and cuBLAS adds up in one order
        torch.use_deterministic_algorithms(True, warn_only=True)
    for each in subjects():
        for kind in DTYPES if each.name in (sys.argv[1:] or [each.name]) else ():
            print(json.dumps(asdict(examine(each, kind))), flush=True)

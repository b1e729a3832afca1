"""Cross-entropy of a linear head without its logits, forward and backward (Wijmans et al. 2024, arXiv:2411.09009).

Shape suffixes: T tokens, D model width, V vocabulary rows of this rank, C chunk of tokens, S splits of the vocabulary.
The forward kernel cuts the vocabulary every SPLIT_ROWS rows, whatever the batch, so that few tokens fill a card too,
and stores three numbers a token and split; the backward pass and the PyTorch path hold one (C, V) tile at a time, never
(T, V). With `group` the head is split by rows over its ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .attention_exact_tiles import add_term, bend_scores, multiply_slices
from .attention_tiles import raise_two, tanh_series
from .jit import architecture, cdiv, exponent, is_exact, jit, tl, use_triton, wide_type

IGNORE = -100
CHUNK_TOKENS = 256
CHUNK_LOGITS = 1 << 27  # of a chunk on a card: 256 MiB of bf16, so that chunks, and sums over the head, are few
SPLIT_ROWS = 8192
JOIN_TOKENS = 1024  # per program of four warps: a 128-bit access for each thread, of 64 a warp too


class LogitTile(NamedTuple):
    """Tokens, vocabulary rows and width of one step; warps, and software-pipeline stages."""

    tokens: int
    rows: int
    width: int
    warps: int
    stages: int


def logit_tile_of(arch: str, dtype: torch.dtype) -> LogitTile:
    """The configuration, a plain function of the architecture and dtype."""
    if is_exact(dtype):  # shorter chains of sums round less; the gradient spills with four warps on NVIDIA
        return LogitTile(64, 64, 32, 4, 2) if arch.startswith("gfx") else LogitTile(64, 64, 32, 8, 3)
    if arch == "sm_90":
        return LogitTile(128, 256, 64, 8, 3)
    return LogitTile(64, 64, 64, 4, 2 if arch.startswith("gfx") else 3)


class Head(NamedTuple):
    """What the softmax does besides multiplying: options of `token_log_probs`."""

    ignore_index: int
    softcap: float | None
    group: Any


def reference_log_probs(x_TD, weight_VD, targets_T, *, ignore_index=IGNORE, softcap=None):
    """The plain PyTorch twin of `token_log_probs` on one rank: forms all logits. Returns (log p, logsumexp),
    each (T,)."""
    logits_TV = torch.matmul(x_TD, weight_VD.T)
    logits_TV = logits_TV.to(wide_type(logits_TV.dtype))
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    lse_T = torch.logsumexp(logits_TV, -1)
    live_T = targets_T != ignore_index
    picked_T = logits_TV.gather(1, torch.where(live_T, targets_T, 0)[:, None])[:, 0]
    return torch.where(live_T, picked_T - lse_T, 0.0), torch.where(live_T, lse_T, 0.0)


def token_log_probs(
    x_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor, *, ignore_index: int = IGNORE,
    softcap: float | None = None, group: ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """log softmax(x weight^T)[target] and its log-sum-exp, both (T,) fp32 and differentiable; ignored tokens give 0.

    For SFT take -sum of the first over the global token count, for DPO its sum per sequence, for GRPO the tokens.
    `softcap` is cap * tanh(logit / cap). With `group`, `weight_VD` is this rank's V rows in rank order and every rank
    holds all of x and targets; each then gets the whole answer, and its own share of dx already added up.
    """
    if x_TD.ndim != 2 or weight_VD.ndim != 2 or x_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"token_log_probs: x {tuple(x_TD.shape)}, weight {tuple(weight_VD.shape)} must share a width")
    if targets_T.shape != x_TD.shape[:1]:
        raise ValueError(f"token_log_probs: targets {tuple(targets_T.shape)} must be one per token ({x_TD.shape[0]},)")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"token_log_probs: softcap {softcap}, must be above 0; None is off")
    return _TokenLogProbs.apply(x_TD, weight_VD, targets_T, Head(ignore_index, softcap, group))


def linear_cross_entropy(
    x_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor, *, ignore_index: int = IGNORE,
    softcap: float | None = None, z_loss: float = 0.0, group: ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(sum over tokens of the loss, log p of each token): -log p + z_loss * logsumexp^2. Divide by the global count."""
    log_p_T, lse_T = token_log_probs(
        x_TD, weight_VD, targets_T, ignore_index=ignore_index, softcap=softcap, group=group
    )
    loss = -log_p_T.sum()
    return (loss + z_loss * lse_T.square().sum() if z_loss else loss), log_p_T


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, targets_T, head: Head):
        rank = 0 if head.group is None else dist.get_rank(head.group)
        # ids of this rank's rows; anything else matches no row, ignored tokens included
        ids_T = torch.where(targets_T == head.ignore_index, -1, targets_T - rank * weight_VD.shape[0])
        run = _forward_triton if use_triton(x_TD) else _forward_torch
        picked_T, lse_T, lost_T = run(x_TD, weight_VD, ids_T, head.softcap)
        if head.group is not None:
            dist.all_reduce(picked_T, group=head.group)
            parts = [torch.empty_like(lse_T) for _ in range(dist.get_world_size(head.group))]
            dist.all_gather(parts, lse_T, group=head.group)
            lse_T = torch.logsumexp(torch.stack(parts), 0)  # in rank order on every rank: the same bits
            lost_T = torch.zeros_like(lse_T)
        live_T = targets_T != head.ignore_index
        ctx.save_for_backward(x_TD, weight_VD, ids_T, lse_T, lost_T, live_T)
        ctx.head = head
        return torch.where(live_T, picked_T - lse_T - lost_T, 0.0), torch.where(live_T, lse_T, 0.0)

    @staticmethod
    def backward(ctx, dlog_p_T, dlse_T):
        x_TD, weight_VD, ids_T, lse_T, lost_T, live_T = ctx.saved_tensors
        # d/dlogit = hit * one_hot + soft * p
        hit_T = torch.where(live_T, dlog_p_T, 0.0)
        soft_T = torch.where(live_T, dlse_T - dlog_p_T, 0.0)
        run = _backward_triton if use_triton(x_TD) else _backward_torch
        trains = ctx.needs_input_grad[1]
        dx_TD, dweight_VD = run(x_TD, weight_VD, ids_T, lse_T, lost_T, hit_T, soft_T, ctx.head.softcap, trains)
        if ctx.head.group is not None:
            dist.all_reduce(dx_TD, group=ctx.head.group)
        return dx_TD.to(x_TD.dtype), None if dweight_VD is None else dweight_VD.to(weight_VD.dtype), None, None


def _logits(x_CD, weight_VD, softcap):
    """fp32 logits of one chunk and the slope of the softcap (None without)."""
    raw_CV = torch.matmul(x_CD, weight_VD.T).to(wide_type(x_CD.dtype))
    if softcap is None:
        return raw_CV, None
    bend_CV = torch.tanh(raw_CV / softcap)
    return softcap * bend_CV, 1 - bend_CV * bend_CV


def _forward_torch(x_TD, weight_VD, ids_T, softcap):
    picked, lse = [], []
    for start in range(0, x_TD.shape[0], CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        logits_CV, _ = _logits(x_TD[part], weight_VD, softcap)
        inside_C = (ids_T[part] >= 0) & (ids_T[part] < weight_VD.shape[0])
        at_C1 = torch.where(inside_C, ids_T[part], 0)[:, None]
        picked.append(torch.where(inside_C, logits_CV.gather(1, at_C1)[:, 0], 0.0))
        lse.append(torch.logsumexp(logits_CV, -1))
    empty = x_TD.new_zeros(0, dtype=wide_type(x_TD.dtype))
    lse_T = torch.cat([empty, *lse])
    return torch.cat([empty, *picked]), lse_T, torch.zeros_like(lse_T)


def _backward_torch(x_TD, weight_VD, ids_T, lse_T, lost_T, hit_T, soft_T, softcap, trains: bool):
    dx_TD, dweight_VD = torch.zeros(x_TD.shape, dtype=wide_type(x_TD.dtype), device=x_TD.device), None
    for start in range(0, x_TD.shape[0], CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        logits_CV, slope_CV = _logits(x_TD[part], weight_VD, softcap)
        grad_CV = torch.exp(logits_CV - lse_T[part, None] - lost_T[part, None]) * soft_T[part, None]
        inside_C = (ids_T[part] >= 0) & (ids_T[part] < weight_VD.shape[0])
        at_C1 = torch.where(inside_C, ids_T[part], 0)[:, None]
        grad_CV.scatter_add_(1, at_C1, torch.where(inside_C, hit_T[part], 0.0)[:, None])
        grad_CV = (grad_CV if slope_CV is None else grad_CV * slope_CV).to(x_TD.dtype)
        dx_TD[part] = torch.matmul(grad_CV, weight_VD)
        if trains:
            dweight_VD = _added(dweight_VD, torch.matmul(grad_CV.T, x_TD[part]))
    return dx_TD, torch.zeros_like(weight_VD) if trains and dweight_VD is None else dweight_VD


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """The sum of the chunks' gradients, in fp32 where there are several; one alone needs no pass over the head."""
    return part if total is None else total.to(wide_type(part.dtype)).add_(part)


def _switches(x_TD, softcap) -> dict[str, Any]:
    tile = logit_tile_of(architecture(x_TD.device), x_TD.dtype)
    cap = softcap or 1.0
    return dict(
        WIDTH=x_TD.shape[1], CAP=cap, SOFTCAP=softcap is not None, BT=tile.tokens, BV=tile.rows, BD=tile.width,
        PRECISION="ieee", CAP_C=exponent(x_TD.dtype, 2.0 / cap)["C"], num_warps=tile.warps, num_stages=tile.stages,
        **exponent(x_TD.dtype),
    )  # fmt: skip


def _forward_triton(x_TD, weight_VD, ids_T, softcap):
    x_TD, weight_VD = x_TD.contiguous(), weight_VD.contiguous()
    tokens, vocabulary = x_TD.shape[0], weight_VD.shape[0]
    splits, switches = cdiv(vocabulary, SPLIT_ROWS), _switches(x_TD, softcap)
    stride = cdiv(tokens, 16) * 16  # rows of 128-bit accesses
    picked, lse, lost = (torch.empty(stride, dtype=wide_type(x_TD.dtype), device=x_TD.device) for _ in range(3))
    tops, totals, found = (lse.new_empty(splits, stride) for _ in range(3))
    if tokens:
        log_prob_kernel[(cdiv(tokens, switches["BT"]), splits)](
            x_TD, weight_VD, ids_T, tops, totals, found, tokens, vocabulary, stride, SPLIT=SPLIT_ROWS, **switches
        )
        join_log_probs_kernel[(cdiv(tokens, JOIN_TOKENS),)](
            tops, totals, found, picked, lse, lost, splits, stride, BT=JOIN_TOKENS, num_warps=4,
            **exponent(x_TD.dtype),
        )  # fmt: skip
    return picked[:tokens], lse[:tokens], lost[:tokens]


def _backward_triton(x_TD, weight_VD, ids_T, lse_T, lost_T, hit_T, soft_T, softcap, trains: bool):
    """Each chunk of tokens makes its (C, V) gradient in one kernel,
    then two dense products: cuBLAS is best at those."""
    x_TD, weight_VD = x_TD.contiguous(), weight_VD.contiguous()
    vocabulary, switches = weight_VD.shape[0], _switches(x_TD, softcap)
    dx_TD, dweight_VD = torch.zeros(x_TD.shape, dtype=wide_type(x_TD.dtype), device=x_TD.device), None
    chunk = max(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary // switches["BT"] * switches["BT"])
    for start in range(0, x_TD.shape[0], chunk):
        part = slice(start, start + chunk)
        count = x_TD[part].shape[0]
        grad_CV = torch.empty(count, vocabulary, dtype=x_TD.dtype, device=x_TD.device)
        logit_gradient_kernel[(cdiv(count, switches["BT"]), cdiv(vocabulary, switches["BV"]))](
            x_TD[part], weight_VD, ids_T[part], lse_T[part], lost_T[part], hit_T[part].contiguous(),
            soft_T[part].contiguous(), grad_CV,
            count, vocabulary, **switches,
        )  # fmt: skip
        dx_TD[part] = torch.matmul(grad_CV, weight_VD)
        if trains:
            dweight_VD = _added(dweight_VD, torch.matmul(grad_CV.T, x_TD[part]))
    return dx_TD, torch.zeros_like(weight_VD) if trains and dweight_VD is None else dweight_VD


@jit
def logit_tile(
    x, weight, t, v, tokens, vocabulary,
    WIDTH: tl.constexpr, CAP: tl.constexpr, CAP_C: tl.constexpr,
    SOFTCAP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One (BT, BV) tile of logits, accumulated in COMPUTE, and the slope of their softcap; `t` and `v` are 64-bit."""
    logits = tl.zeros([BT, BV], COMPUTE)
    rest = logits  # of fp32: what rounding took from the logits
    for first in range(0, WIDTH, BD):
        d = first + tl.arange(0, BD)
        inside = (d < WIDTH)[None, :]
        x_tile = tl.load(x + t[:, None] * WIDTH + d[None, :], mask=(t < tokens)[:, None] & inside, other=0.0)
        w_tile = tl.load(weight + v[:, None] * WIDTH + d[None, :], mask=(v < vocabulary)[:, None] & inside, other=0.0)
        if x.dtype.element_ty == tl.float32:
            logits, rest = add_term(logits, rest, multiply_slices(x_tile, w_tile, BD, COMPUTE))
        else:
            logits = tl.dot(x_tile, tl.trans(w_tile), logits, input_precision=PRECISION, out_dtype=COMPUTE)
    if x.dtype.element_ty == tl.float32:
        logits += rest
    slope = logits
    if SOFTCAP and EXACT:
        logits, slope = bend_scores(logits, 1.0 / CAP, CAP, COMPUTE)
    elif SOFTCAP:  # cap * tanh(x / cap) with one rounding; 1 - tanh^2 without its cancellation
        x_abs = tl.abs(logits)
        fall = tl.exp2(-x_abs * CAP_C)  # e^(-2 |x| / cap)
        gap = 2.0 * fall / (1.0 + fall)  # 1 - tanh
        y = logits / CAP
        near = tl.fma(x_abs, tanh_series(y * y), x_abs)
        far = tl.fma(gap, tl.full([1, 1], -CAP, COMPUTE), tl.full([1, 1], CAP, COMPUTE))
        bend = near / CAP
        slope = tl.where(bend < 0.5, tl.fma(bend, -bend, tl.full([1, 1], 1.0, COMPUTE)), gap * (2.0 - gap))
        far = tl.where(bend < 0.5, near, far)
        logits = tl.where(logits < 0, -far, far)
    return logits, slope


@jit
def log_prob_kernel(
    x, weight, ids, tops, totals, found, tokens, vocabulary, stride,
    WIDTH: tl.constexpr, CAP: tl.constexpr, CAP_C: tl.constexpr,
    SOFTCAP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One program sweeps one split of the vocabulary for BT tokens: their largest logit there, the sum of exponentials
    below it, and the target's logit if it is one of these rows, else zero."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    split = tl.program_id(1)
    target = tl.load(ids + t, mask=t < tokens, other=-1)
    top = tl.full([BT], float("-inf"), COMPUTE)
    total = tl.zeros([BT], COMPUTE)
    hit = tl.zeros([BT], COMPUTE)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocabulary), BV):
        v = (first + tl.arange(0, BV)).to(tl.int64)
        logits, _ = logit_tile(x, weight, t, v, tokens, vocabulary, WIDTH, CAP, CAP_C, SOFTCAP, BT, BV, BD,
                                  PRECISION, EXACT, COMPUTE)  # fmt: skip
        hit += tl.sum(tl.where(target[:, None] == v[None, :], logits, 0.0), 1)
        logits = tl.where((v < vocabulary)[None, :], logits, float("-inf"))
        top_new = tl.maximum(top, tl.max(logits, 1))
        fade = raise_two(top - top_new, C, C_LOW, EXACT, COMPUTE)
        total = total * fade + tl.sum(raise_two(logits - top_new[:, None], C, C_LOW, EXACT, COMPUTE), 1)
        top = top_new
    at = split * stride + t
    tl.store(tops + at, top, mask=t < stride)
    tl.store(totals + at, total, mask=t < stride)
    tl.store(found + at, hit, mask=t < stride)


@jit
def join_log_probs_kernel(
    tops, totals, found, picked, lse, lost, splits, stride,
    BT: tl.constexpr, COMPUTE: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Joins the splits of BT tokens, first to last; `lost` is what rounding takes from lse, which is large where log p
    and p are wanted to the last digit."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    live = t < stride
    top = tl.full([BT], float("-inf"), COMPUTE)
    total = tl.zeros([BT], COMPUTE)
    hit = tl.zeros([BT], COMPUTE)
    for split in range(0, splits):
        at = split * stride + t
        part_top = tl.load(tops + at, mask=live, other=0.0)
        top_new = tl.maximum(top, part_top)
        total = total * raise_two(top - top_new, C, C_LOW, EXACT, COMPUTE)
        total += tl.load(totals + at, mask=live, other=1.0) * raise_two(part_top - top_new, C, C_LOW, EXACT, COMPUTE)
        hit += tl.load(found + at, mask=live, other=0.0)
        top = top_new
    rest = tl.log(total)
    tl.store(picked + t, hit, mask=live)
    tl.store(lse + t, top + rest, mask=live)
    tl.store(lost + t, top - (top + rest) + rest, mask=live)


@jit
def logit_gradient_kernel(
    x, weight, ids, lse, lost, hit, soft, grad, tokens, vocabulary,
    WIDTH: tl.constexpr, CAP: tl.constexpr, CAP_C: tl.constexpr,
    SOFTCAP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """d loss / d logit of one tile, recomputing its logits: hit where the target is, soft * p everywhere."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    v = (tl.program_id(1) * BV + tl.arange(0, BV)).to(tl.int64)
    logits, slope = logit_tile(x, weight, t, v, tokens, vocabulary, WIDTH, CAP, CAP_C, SOFTCAP, BT, BV, BD,
                                PRECISION, EXACT, COMPUTE)  # fmt: skip
    live = t < tokens
    rounding = tl.load(lost + t, mask=live, other=0.0)[:, None]
    below = logits - tl.load(lse + t, mask=live, other=float("inf"))[:, None] - rounding
    p = raise_two(below, C, C_LOW, EXACT, COMPUTE)
    out = p * tl.load(soft + t, mask=live, other=0.0)[:, None]
    is_target = tl.load(ids + t, mask=live, other=-1)[:, None] == v[None, :]
    out = tl.where(is_target, out + tl.load(hit + t, mask=live, other=0.0)[:, None], out)
    if SOFTCAP:
        out = out * slope
    inside = live[:, None] & (v < vocabulary)[None, :]
    tl.store(grad + t[:, None] * vocabulary + v[None, :], out.to(grad.dtype.element_ty), mask=inside)

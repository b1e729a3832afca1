"""How long one optimizer step takes: each operation at the rate its card reaches, each collective at its link's, and
what of the collectives hides behind the operations.

One set of constants serves every card, model and engine. `matmul` was fitted to three published rows (one model, eight
cards); the others are round numbers from the literature or ours, stated beside each. docs/planner.md has what they
predict for runs that others measured, and for the fitted rows what a fit without them predicts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .cards import Card, Cluster
from .footprint import Footprint, measure
from .op_costs import Op
from .pipeline import most_blocks, stages_of
from .state import WIDTH, Parameter, parameters, state_of
from .workload import Workload


@dataclass(frozen=True)
class Constants:
    """Shares of what a card or link could do, and habits of the software."""

    matmul: float = 0.71
    """Of the card's reachable arithmetic, by the products of a training step, which are smaller than the best ones."""
    memory: float = 0.85
    """Of the published bandwidth, by pointwise kernels."""
    link: float = 0.80
    """Of a link's line rate, by NCCL's rings (370 of 450 GB/s on an H100's NVLink)."""
    contention: float = 0.15
    """Compute is slowed by this share of the communication that runs beside it: it takes multiprocessors and
    bandwidth."""
    async_hidden: float = 0.30
    """Of tensor-parallel collectives, hidden behind products by async TP."""
    launch_s: float = 5e-6
    """What the host needs for one kernel; many small ones are bound by it."""
    hop_s: float = 4e-6
    """Latency of one hop of a ring."""
    float8_bytes: float = 5.0
    """Moved per number that enters a float8 product: read for its maximum, read again, written in one byte."""
    optimizer_bytes: float = 60.0
    """Moved per trained number by clipping and torch's foreach AdamW."""


CONSTANTS = Constants()


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on, and bytes that one card sends in it."""

    compute_s: float
    exposed_s: float
    """Communication that nothing hides."""
    slowed_s: float
    """Compute lost to communication beside it."""
    bubble_s: float
    optimizer_s: float
    nvlink_bytes: float
    network_bytes: float
    flops: float
    """Computed by one card, recomputation included."""

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s + self.slowed_s + self.bubble_s + self.optimizer_s


@dataclass
class _Traffic:
    """Adds up bytes by link."""

    nvlink: float = 0.0
    network: float = 0.0


def step_time(
    work: Workload, cluster: Cluster, footprint: Footprint | None = None, constants: Constants = CONSTANTS
) -> StepTime:
    """Return the time of one optimizer step on the cluster."""
    footprint = footprint or measure(work.one_pass())
    share = work.tensor if work.sequence_parallel else 1
    layers = most_blocks(work)  # a pipeline goes at the pace of its longest stage
    block_s = ops_time(footprint.block_ops, work, cluster.card, constants, in_block=True) / share
    rest_s = ops_time(footprint.rest_ops, work, cluster.card, constants, in_block=False) / share
    launched = _launches(footprint, work) * constants.launch_s
    one_s = max(layers * block_s + rest_s, launched)
    traffic = _Traffic()
    exposed, hidden = _sharded(work, cluster, constants, block_s, layers, one_s, traffic)
    if work.tensor > 1 or work.context > 1:
        extra = _shared_sample(work, cluster, constants, layers, traffic)
        exposed, hidden = exposed + extra[0], hidden + extra[1]
    compute = work.rounds * one_s
    bubble = (work.pipeline - 1) / work.chunks * one_s
    trained = _local_numbers(work)
    optimizer = trained * constants.optimizer_bytes / (cluster.card.memory_gb_per_s * 1e9 * constants.memory)
    flops = work.rounds * (layers * _flops(footprint.block_ops) + _flops(footprint.rest_ops)) / share
    bubble += bubble / compute * exposed if work.pipeline > 1 else 0.0
    slowed = constants.contention * hidden
    return StepTime(compute, exposed, slowed, bubble, optimizer, traffic.nvlink, traffic.network, flops)


def ops_time(ops: Iterable[Op], work: Workload, card: Card, constants: Constants, in_block: bool) -> float:
    """Seconds of a list of operations, one after the other, each bound by arithmetic or by memory."""
    bandwidth = card.memory_gb_per_s * 1e9 * constants.memory
    masked = work.packed and work.micro > 1 and work.path == "stock"
    pairs = 1.0 if masked else 0.5  # a causal kernel skips half of them, a masked one none
    half = 0.5 if work.dtype == "float32" else 1.0  # TF32 has half of bf16's rate
    bf16 = card.bf16_tflops * 1e12 * card.reachable * constants.matmul * half
    float8 = card.float8_tflops * 1e12 * card.reachable * constants.matmul
    flash = card.flash3 if work.flash3 else card.flash2
    attention = card.bf16_tflops * 1e12 * half
    total = 0.0
    for op in ops:
        if op.kind == "attention":
            seconds = op.flops * pairs / (attention * (card.triton if op.kernel else flash))
            total += max(seconds, op.eager_bytes / bandwidth)
        elif op.kind == "pointwise":
            total += (op.fused_bytes if work.compile and in_block else op.eager_bytes) / bandwidth
        elif work.float8 and in_block:
            total += op.flops / float8 + op.operands * constants.float8_bytes / bandwidth
        else:
            total += max(op.flops / bf16, op.eager_bytes / bandwidth)
    if work.quantize == "nf4" and in_block:
        total += _dequantize_s(ops, work, bandwidth)
    return total


def _dequantize_s(ops: Iterable[Op], work: Workload, bandwidth: float) -> float:
    """Every product of a frozen layer reads 4-bit weights and writes them in full first."""
    products = sum(1 for op in ops if op.kind == "matmul")
    linear = [p for p in parameters(work.config, work.lora_rank, work.lora_targets) if p.linear]
    each = sum(p.numbers for p in linear) / max(1, len(linear))
    adapters = 3 if work.lora_rank else 1  # of three products of an adapted layer, one is the frozen one
    return products / adapters * each * (0.5 + 2) / bandwidth


def _launches(footprint: Footprint, work: Workload) -> float:
    def count(ops: Iterable[Op], fused: bool) -> int:
        return sum(1 if fused else op.launches for op in ops)

    return most_blocks(work) * count(footprint.block_ops, work.compile) + count(footprint.rest_ops, False)


def _flops(ops: Iterable[Op]) -> float:
    return sum(op.flops / 2 if op.kind == "attention" else op.flops for op in ops)


def _local_numbers(work: Workload) -> float:
    """Trained numbers that one rank's optimizer updates; the host's are not a card's time."""
    if work.offload:
        return 0.0
    alone = replace(work, engine="ddp", rounds=1, reference=False)
    numbers = max(state_of(alone, stage).gradients for stage in stages_of(work)) / 4
    return numbers / (work.shards if work.engine != "ddp" else 1)


def ring_s(sent: float, ranks: int, spread: int, cluster: Cluster, constants: Constants, traffic: _Traffic) -> float:
    """Seconds of an all-gather or reduce-scatter of `sent` bytes in all over `ranks` ranks, `spread` apart in rank
    order (1: neighbours, so the ring fills machines first).

    A ring moves (ranks - 1)/ranks of the bytes over each of its links. Inside a machine that is NVLink; between
    machines every rank of the ring in a machine brings its own network adapter.
    """
    if ranks <= 1 or sent == 0:
        return 0.0
    moved = sent * (ranks - 1) / ranks
    inside = max(1, min(ranks, cluster.per_machine // min(spread, cluster.per_machine)))
    if inside >= ranks:
        traffic.nvlink += moved
        rate = cluster.card.nvlink_gb_per_s
    else:
        traffic.network += moved / inside
        traffic.nvlink += moved * (inside - 1) / inside
        rate = min(cluster.card.nvlink_gb_per_s if inside > 1 else float("inf"), cluster.card.network_gb_per_s * inside)
    return moved / (rate * 1e9 * constants.link) + (ranks - 1) * constants.hop_s


def _numbers(work: Workload) -> tuple[float, float, float]:
    """Numbers of one block, of the rest, and the share of them that train; as tensor-parallel ranks hold them."""
    whole = parameters(work.config, work.lora_rank, work.lora_targets)

    def size(parameter: Parameter) -> float:
        cut = len(parameter.shape) > 1 and (parameter.block or work.sequence_parallel)
        return parameter.numbers / (work.tensor if cut else 1)

    block = sum(size(p) for p in whole if p.block) / work.layers()
    rest = sum(size(p) for p in whole if not p.block) / (2 if work.pipeline > 1 else 1)
    trained = sum(size(p) for p in whole if p.trained) / sum(map(size, whole))
    return block, rest, trained


def _sharded(
    work: Workload,
    cluster: Cluster,
    constants: Constants,
    block_s: float,
    layers: float,
    one_s: float,
    traffic: _Traffic,
) -> tuple[float, float]:
    """Exposed and hidden seconds of what data-parallel ranks exchange in one step."""
    block, rest, trained = _numbers(work)
    width = WIDTH[work.dtype]
    whole = layers * block + rest
    forward = 0.25 if work.checkpointing == "full" else 0.33

    def ring(sent: float, times: float) -> float:
        mine = _Traffic()
        seconds = ring_s(sent, work.shards, work.tensor, cluster, constants, mine)
        traffic.nvlink += times * mine.nvlink
        traffic.network += times * mine.network
        return seconds

    rounds = work.rounds
    if work.engine in ("fsdp2", "zero3"):
        passes = 1 if work.pipeline > 1 else rounds
        scatters = rounds if work.engine == "zero3" else 1
        gather = ring(width * block, 2 * layers * passes)
        scatter = ring((width if work.engine == "zero3" else 4) * trained * block, layers * scatters)
        ends = ring(width * rest, passes) + ring(4 * trained * rest, scatters) + gather + scatter
        in_forward = max(0.0, gather - forward * block_s) * layers * passes
        in_backward = layers * (
            max(0.0, gather + scatter - (1 - forward) * block_s) * scatters
            + max(0.0, gather - (1 - forward) * block_s) * (passes - scatters)
        )
        everything = layers * (2 * gather * passes + scatter * scatters)
        exposed = min(in_forward + in_backward, everything) + ends
        return exposed, max(0.0, everything - in_forward - in_backward)
    sent = (4 if work.engine == "ddp" else width) * trained * whole
    reductions = rounds if work.engine == "zero2" else 1
    reduce = ring(sent, reductions) * reductions
    spread = ring(sent, 1)
    behind = (1 - forward) * one_s * reductions
    if work.engine == "ddp":
        exposed = max(0.0, reduce + spread - behind)
        return exposed, reduce + spread - exposed
    exposed = max(0.0, reduce - behind)
    return exposed + spread, reduce - exposed


def _shared_sample(
    work: Workload, cluster: Cluster, constants: Constants, layers: float, traffic: _Traffic
) -> tuple[float, float]:
    """Exposed and hidden seconds of what ranks that share a sample exchange in one step.

    Tensor parallel (Shoeybi et al. 2019; with a shared residual stream, Korthikanti et al. 2022): each block gathers
    and scatters its input twice forward, twice backward, gathers twice more for weights' gradients, and once more
    forward if it recomputes. Gathers of float8 inputs send one byte a number. Context parallel: keys and values go
    round a ring.
    """
    import json

    config = json.loads(work.config)
    numbers = work.micro * work.tokens // work.context * config["hidden_size"]
    again = 2 if work.checkpointing in ("full", "alternate") else 0
    gathered = (6 if work.sequence_parallel else 4) + again
    scattered = 4 + again
    exposed = hidden = 0.0
    if work.tensor > 1:
        sent = numbers * (gathered * (1 if work.float8 else 2) + scattered * 2)
        seconds = ring_s(sent, work.tensor, 1, cluster, constants, one := _Traffic()) * layers * work.rounds
        traffic.nvlink += one.nvlink * layers * work.rounds
        traffic.network += one.network * layers * work.rounds
        share = constants.async_hidden if work.async_tensor else 0.0
        exposed, hidden = seconds * (1 - share), seconds * share
    if work.context > 1:
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        sent = (
            2 * 2 * work.micro * work.tokens * heads * head / work.tensor * 3
        )  # bf16 keys, values; once, and twice back
        hidden += ring_s(sent, work.context, work.tensor, cluster, constants, one := _Traffic()) * layers * work.rounds
        traffic.nvlink += one.nvlink * layers * work.rounds
        traffic.network += one.network * layers * work.rounds
    return exposed, hidden

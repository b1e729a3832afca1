"""The ranks of a job laid out in dimensions: data-parallel groups outside, context and tensor neighbours inside."""

from typing import cast

from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .ranks import Ranks
from .recipe import Parallel


def device_mesh(ranks: Ranks, parallel: Parallel) -> DeviceMesh:
    """The mesh of Accelerate's ParallelismConfig: "cp" and "tp" where a recipe has them, and "dp_shard_cp", the ranks
    over which weights may be cut.

    Raises ValueError, one line, where context and tensor neighbours cannot share the ranks evenly. Collective.
    """
    alike, world = parallel.context * parallel.tensor, ranks.world_size
    if world % alike:
        name, size = ("tensor", parallel.tensor) if parallel.context == 1 else ("context", parallel.context)
        what = "a layer" if name == "tensor" else "each row"
        both = "" if alike == size else f" (and parallel.tensor {parallel.tensor}: {alike} together)"
        raise ValueError(
            f"parallel.{name}: {size} ranks share {what}{both}, but {world} are no multiple of that; start "
            f"{-(-world // alike) * alike}"
        )
    config = ParallelismConfig(
        dp_replicate_size=1, dp_shard_size=world // alike, cp_size=parallel.context, tp_size=parallel.tensor, sp_size=1
    )
    if config.dp_shard_cp_dim_names:
        return cast(DeviceMesh, config.build_device_mesh(ranks.device.type))
    # Accelerate leaves out what has one rank; FSDP2 wants a dimension also then, so that every weight is a DTensor.
    return init_device_mesh(ranks.device.type, (1, parallel.tensor), mesh_dim_names=(cast(str, "dp_shard_cp"), "tp"))

"""Choose the sizes of FSDP2's shard groups that the command ``plan`` compares."""

from pipeline.config.schema import Config

GROUP_MARK = "/"  # in the name of a plan, between the backend and the size of the shard groups


def with_shard_groups(config: Config | None, world_size: int, per_node: int) -> dict[str, Config]:
    """Return plan name -> copy of the FSDP2 config, with one copy per possible size of the shard groups.

    A shard group is a set of ranks that together hold one copy of the weights. A possible size is the number of ranks
    on 1, 2, 4, 8, ... nodes. It is smaller than the world size, and divides the world size. The plan for groups of 8
    ranks has the name ``fsdp/8``.

    If ``config`` is None or already sets the size of the shard groups, return an empty dict.

    Args:
        config: the FSDP2 config.
        per_node: the number of ranks per node.
    """
    if config is None or config.backend.fsdp.shard_group_size is not None or world_size % per_node:
        return {}
    configs, size = {}, per_node
    while size < world_size:
        if world_size % size == 0:
            fsdp = config.backend.fsdp.model_copy(update={"shard_group_size": size})
            backend = config.backend.model_copy(update={"fsdp": fsdp})
            configs[f"fsdp{GROUP_MARK}{size}"] = config.model_copy(update={"backend": backend})
        size *= 2
    return configs

"""Choose the sizes of FSDP2's shard groups that the command ``plan`` compares."""

from pipeline.config.schema import Config

GROUP_MARK = "/"  # in the name of a plan, between the backend and the size of the shard groups


def with_shard_groups(config: Config | None, world_size: int, per_node: int) -> dict[str, Config]:
    """Return copies of the FSDP2 config whose shard groups have the ranks of one, two, four, ... nodes.

    A shard group is a set of ranks that together hold one copy of the weights. Only sizes that divide the world size
    are used. The keys of the result are the names of the plans.

    The result is empty if ``config`` is None or sets the size of the shard groups. It is also empty if the ranks do not
    fill at least two nodes.

    Args:
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

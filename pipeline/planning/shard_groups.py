"""Choose the sizes of shard groups that are worth planning for FSDP2."""

from pipeline.config.schema import Config

GROUP_MARK = "/"  # in the name of a plan, between the backend and the size of the shard groups


def with_shard_groups(config: Config | None, world_size: int, per_node: int) -> dict[str, Config]:
    """Return copies of the FSDP2 config with larger and larger shard groups.

    A shard group is a set of ranks that together hold one copy of the weights. In the first copy of the config, a shard
    group contains the ranks of one node. In the later copies, it contains the ranks of two, four, eight, ... nodes. If
    the groups for a number of nodes would not have equal sizes, this number is skipped.

    The keys of the result are names for the plans. The result is empty in three cases: ``config`` is None, ``config``
    already sets the size of the shard groups, or the ranks do not exactly fill two or more nodes.

    Args:
        config: a config with the backend FSDP2, or None.
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

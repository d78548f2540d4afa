"""Vision encoders made smaller: fewer blocks, fewer heads, narrower MLPs."""

from tokenreduce.hookspecs import Register, hookimpl


@hookimpl
def register_encoder_pruners(register: Register) -> None:
    """Register the built-in pruners."""
    here = "tokenreduce_integrations.pruning"
    for name, pruner, extra, summary in (
        ("structured", "structured:StructuredPruner", "", "blocks, heads and MLP channels"),
        (
            "torch_pruning",
            "dependency_graph:DependencyGraphPruner",
            "vision",
            "MLP channels of any encoder that can be traced",
        ),
        ("checkpoint", "checkpoint:PrunedCheckpoint", "", "an encoder that was pruned elsewhere"),
    ):
        register(name, f"{here}.{pruner}", extra=extra, summary=summary)

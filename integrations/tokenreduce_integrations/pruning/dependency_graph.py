"""MLP channels of any encoder, found by following its computation with torch-pruning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch_pruning
from torch import nn

from tokenreduce.errors import PipelineError, UnsupportedModel
from tokenreduce_integrations.pruning import options as option
from tokenreduce_integrations.pruning.encoders import Encoder, find_encoder, picture_size
from tokenreduce_integrations.pruning.surgery import Slice, SurgeryPlan

_SCORES = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "lamp": torch_pruning.importance.LAMPImportance,
    "fpgm": torch_pruning.importance.FPGMImportance,
}
_COLUMNS = (torch_pruning.prune_linear_in_channels,)
_ROWS = (torch_pruning.prune_linear_out_channels, torch_pruning.prune_layernorm_out_channels)


class DependencyGraphPruner:
    """Encoders that take pictures of a fixed size.

    Channels between two linear layers leave where nothing else reads or writes them; attention and
    the residual stream are never touched. The backend ``structured`` removes heads and blocks.

    Options:
        mlp_ratio: share of those channels to remove.
        importance: ``magnitude``, ``lamp`` or ``fpgm``, as torch-pruning computes them.
        multiple_of: widths become multiples of it.
    """

    known = ("mlp_ratio", "importance", "multiple_of")

    def check(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        """See :class:`tokenreduce.backends.EncoderPruner`."""
        option.refuse_unknown(options, self.known)
        if not option.share(options, "mlp_ratio"):
            raise PipelineError(f"{option.WHERE}: nothing to remove. Give mlp_ratio.")
        option.choice(options, "importance", tuple(_SCORES))
        option.whole(options, "multiple_of", 8)
        _example(find_encoder(model))

    def prune(self, model: nn.Module, options: Mapping[str, Any], processor: Any) -> None:
        """See :class:`tokenreduce.backends.EncoderPruner`."""
        self.check(model, options)
        encoder = find_encoder(model)
        keep = 1 - option.share(options, "mlp_ratio")
        multiple = option.whole(options, "multiple_of", 8)
        score = _SCORES[option.choice(options, "importance", tuple(_SCORES))]()
        slices: dict[str, Slice] = {}
        weightless = next(encoder.module.parameters()).is_meta
        for group, width in _inner_groups(encoder):
            wanted = max(1, round(width * keep / multiple)) * multiple
            if wanted < width:
                scores = torch.ones(width) if weightless else score(group)
                best = scores.argsort(descending=True, stable=True)[:wanted]
                kept = tuple(best.sort().values.tolist())
                slices |= {name: _cut(rows, kept) for name, rows in _names(encoder, group)}
        if not slices:
            raise UnsupportedModel(
                f"{encoder.path} ({type(encoder.module).__name__}): torch-pruning found no "
                "channels between two linear layers that could leave."
            )
        plan = SurgeryPlan(
            encoder=encoder.path,
            blocks=encoder.blocks_path,
            kept=tuple(range(len(encoder.blocks))),
            slices=slices,
            record={"backend": "torch_pruning", **options},
        )
        plan.apply(model)


def _example(encoder: Encoder) -> torch.Tensor:
    size = picture_size(encoder.module.config)
    if size is None:
        raise UnsupportedModel(
            f"{encoder.path} ({type(encoder.module).__name__}) takes no pictures of a fixed size, "
            "so that torch-pruning cannot follow it. Use the backend structured."
        )
    parameter = next(encoder.module.parameters())
    return torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype)


def _inner_groups(encoder: Encoder) -> Iterator[tuple[Any, int]]:
    """Groups of channels that one MLP's linear layers and norms alone write and read."""
    graph = _trace(encoder)
    inside = {
        module
        for block in encoder.blocks
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear) and "att" not in name
    }
    done: set[nn.Module] = set()
    for module in encoder.module.modules():
        if module not in inside or module in done or module not in graph.module2node:
            continue
        every = list(range(module.out_features))
        group = graph.get_pruning_group(module, torch_pruning.prune_linear_out_channels, every)
        held = [dep for dep, _ in group if _has_weights(dep.target.module)]
        readers = [dep.target.module for dep in held if dep.handler in _COLUMNS]
        known = all(dep.handler in (*_ROWS, *_COLUMNS) for dep in held)
        whole = all(len(index) == module.out_features for _, index in group)
        if known and whole and len(readers) == 1 and readers[0] in inside:
            done |= {dep.target.module for dep in held}
            yield group, module.out_features


def _trace(encoder: Encoder) -> Any:
    """The dependency graph, which is read off autograd."""
    frozen = [p for p in encoder.module.parameters() if not p.requires_grad]
    try:
        with torch.enable_grad():
            for parameter in frozen:
                parameter.requires_grad_(True)
            return torch_pruning.DependencyGraph().build_dependency(
                encoder.module,
                example_inputs={"pixel_values": _example(encoder)},
                forward_fn=lambda module, inputs: module(**inputs).last_hidden_state,
                verbose=False,
            )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _has_weights(target: Any) -> bool:
    """Whether a node of the graph is a parameter, or a module that holds some."""
    return isinstance(target, nn.Parameter) or any(True for _ in target.parameters())


def _names(encoder: Encoder, group: Any) -> Iterator[tuple[str, bool]]:
    """Paths of a group's layers, and whether their rows are its channels."""
    paths = {module: name for name, module in encoder.module.named_modules()}
    for dep, _ in group:
        if dep.target.module in paths and _has_weights(dep.target.module):
            yield paths[dep.target.module], dep.handler in _ROWS


def _cut(rows: bool, kept: tuple[int, ...]) -> Slice:
    return Slice(rows=kept) if rows else Slice(columns=kept)

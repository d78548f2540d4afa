"""What a model consists of beside its weights, to tell whether something was left on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


@dataclass(frozen=True)
class Trace:
    """A model's modules with their attributes and hooks, its classes, and its configuration."""

    modules: dict[str, tuple[Any, ...]]
    classes: dict[type, dict[str, int]]
    config: str

    def difference(self, other: Trace) -> str:
        """What another trace of the model has that this one has not, or the other way round."""
        for name, mine in self.modules.items():
            theirs = other.modules.get(name)
            if mine != theirs:
                where = name or "the model"
                if theirs is None:
                    return f"{where} is gone"
                if mine[0] != theirs[0]:
                    return f"{where} is a {theirs[0].__name__} now"
                return f"{where} has other attributes, hooks or methods"
        if len(self.modules) != len(other.modules):
            return "it has more modules"
        for cls, attributes in self.classes.items():
            if attributes != other.classes.get(cls):
                return f"the class {cls.__name__} was patched"
        return "" if self.config == other.config else "its configuration"


def trace_of(model: nn.Module) -> Trace:
    """The trace of a model as it is now."""
    modules, classes = {}, {}
    for name, module in model.named_modules():
        own = vars(module)
        hooks = tuple(tuple(own[hook]) for hook in _HOOKS if hook in own)
        modules[name] = (type(module), tuple(sorted(own)), hooks, id(own.get("forward")))
        for cls in type(module).__mro__:
            if issubclass(cls, nn.Module) and cls is not nn.Module:
                classes[cls] = {key: id(value) for key, value in vars(cls).items()}
    describe = getattr(getattr(model, "config", None), "to_dict", dict)
    return Trace(modules, classes, str(describe()))

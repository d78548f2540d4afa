"""What a strategy can do, as data: read when it is registered, without importing its code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tokenreduce.errors import RegistrationError, UnknownName, did_you_mean

Site = Literal["frames", "vision", "projector", "decoder"]
Kind = Literal["prune", "merge"]
CountClass = Literal["exact", "layout", "adaptive"]
CostClass = Literal[
    "score",
    "neighbor",
    "bipartite",
    "graph",
    "greedy",
    "coverage",
    "removal",
    "decomposition",
    "per_frame",
]
Parity = Literal["official", "description", "none"]

SITES: tuple[Site, ...] = get_args(Site)
#: From the strictest to the loosest.
COUNT_CLASSES: tuple[CountClass, ...] = get_args(CountClass)

COST_MEANING: dict[str, str] = {
    "score": "one pass over the features, then top-k",
    "neighbor": "one nearest-neighbour search",
    "bipartite": "bipartite matching: a quarter of the Gram matrix a round",
    "graph": "products of all pairs, and passes over that matrix",
    "greedy": "greedy selection with running distances, k steps over N tokens",
    "coverage": "greedy coverage, k steps over an N x N matrix",
    "removal": "iterative removal, several rounds over what remains",
    "decomposition": "a singular value decomposition of the tokens",
    "per_frame": "the same work for each frame, linear in frames",
}

#: The most that a class may cost, in products of the features with themselves (N x N x D), at 2304
#: tokens of 1024 channels of which an eighth is kept. Without a limit: what is linear in frames.
COST_LIMIT: dict[str, float] = {
    "score": 0.1,
    "neighbor": 0.6,
    "bipartite": 0.6,
    "graph": 4.0,
    "greedy": 1.3,
    "coverage": 3.0,
    "removal": 4.0,
    "decomposition": 4.0,
}


#: What a stage says beside its strategy and that one's options.
STAGE_KEYS = ("site", "total", "layer", "schedule", "flops", "prefill_ms")
_BUDGETS = ("keep", "keep_ratio", "reduction", "total", "schedule", "flops", "prefill_ms")
_DEPTHS = ("layer", "schedule")
_FLAGS = ("needs_grid", "reads_features", "needs_weights", "wraps", "compiles")


@dataclass(frozen=True, kw_only=True)
class StrategyRecord:
    """The registration record of a strategy.

    Attributes:
        name: the registered name.
        target: ``"module:Class"`` of the reducer, imported on first use.
        summary: one line.
        sites: where it can run.
        kind: whether it prunes (gathers) or merges tokens.
        count: ``"exact"``: the kept count follows from the budget alone; ``"layout"``: also from
            frames, height and width; ``"adaptive"``: from the data.
        cost: the cost class, see :data:`COST_MEANING`.
        needs: names of the signals it reads beside the features themselves.
        uses: names of the signals that it reads as well where the tokens carry them.
        needs_grid: whether it runs only on tokens that form a full (t, y, x) grid.
        reads_features: whether what is kept depends on the features. If not, no pass over them is
            spent on looking for NaN and infinity: only what is kept is looked at. A wrapper says no
            and reads what the strategies in it read.
        needs_weights: whether it runs only with weights from a file that the user names.
        wraps: whether it takes other strategies and applies them.
        compiles: whether what it adds to its base class (``score``, ``select``, ``assign``) can be
            compiled by torch as one graph.
        parity: ``"official"``: equals official code on recorded cases; ``"description"``: written
            from a published description; ``"none"``: there is no official code.
        paper: arXiv identifier, or an empty string.
        extra: the optional dependency group that it needs, or an empty string.
        presets: parameterizations that go by a name: options of the strategy, and keys of its
            stage, as a pipeline would give them.
        distribution: the distribution that registered it; filled in by the loader.
    """

    name: str
    target: str
    summary: str
    sites: tuple[Site, ...] = ("projector",)
    kind: Kind = "prune"
    count: CountClass = "exact"
    cost: CostClass = "score"
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    needs_grid: bool = False
    reads_features: bool = True
    needs_weights: bool = False
    wraps: bool = False
    compiles: bool = False
    parity: Parity = "none"
    paper: str = ""
    extra: str = ""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    distribution: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kind", get_args(Kind)),
            ("count", get_args(CountClass)),
            ("cost", get_args(CostClass)),
            ("parity", get_args(Parity)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise RegistrationError(
                    f"strategy {self.name!r}: {name}={value!r} is not one of {', '.join(allowed)}."
                )
        for name, kind in (
            *((text, str) for text in ("summary", "paper", "extra")),
            *((flag, bool) for flag in _FLAGS),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise RegistrationError(
                    f"strategy {self.name!r}: {name} must be a {kind.__name__}, got {value!r}."
                )
        for name in ("sites", "needs", "uses"):
            value = getattr(self, name)
            if (
                isinstance(value, str)
                or not isinstance(value, tuple | list)
                or not all(isinstance(item, str) for item in value)
            ):
                raise RegistrationError(
                    f"strategy {self.name!r}: {name} must be a tuple of names, got {value!r}."
                )
            object.__setattr__(self, name, tuple(value))
        unknown = set(self.sites) - set(SITES)
        if unknown or not self.sites:
            raise RegistrationError(
                f"strategy {self.name!r}: sites {sorted(unknown) or '()'} unknown. "
                f"A site is one of {', '.join(SITES)}."
            )
        self._check_presets()

    def _check_presets(self) -> None:
        if not isinstance(self.presets, Mapping) or not all(
            isinstance(name, str)
            and isinstance(options, Mapping)
            and all(isinstance(key, str) for key in options)
            for name, options in self.presets.items()
        ):
            raise RegistrationError(
                f"strategy {self.name!r}: presets must map names to options, as in "
                f"{{'official-64': {{'keep': 64}}}}, got {self.presets!r}."
            )
        object.__setattr__(self, "presets", {n: dict(own) for n, own in self.presets.items()})

    def preset(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a preset with those that the user gave in their place.

        A budget that is given replaces that of the preset, however either is stated; so does a
        layer or a schedule.

        Args:
            name: of the preset.
            given: options of the strategy and keys of its stage.

        Raises:
            UnknownName: if the strategy has no such preset.
        """
        if name not in self.presets:
            raise UnknownName(
                f"strategy {self.name!r} has no preset {name!r}. {did_you_mean(name, self.presets)}"
            )
        options = dict(self.presets[name])
        for group in (_BUDGETS, _DEPTHS):
            if any(given.get(key) is not None for key in group):
                options = {key: value for key, value in options.items() if key not in group}
        return options | dict(given)

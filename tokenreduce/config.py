"""Pipelines as YAML: read, checked with key paths and suggestions, and written.

A file is parsed in two steps, so that built-in and third-party strategies are checked alike:
first the keys that belong to the framework (``vars``, ``model``, ``reduce``, and in each stage
``strategy``, ``preset``, ``site``, ``layer``, ``schedule``, ``total``, ``flops``, ``prefill_ms``
and the budget), then the rest of each stage against the fields of the strategy's dataclass.

Interpolation refers to other values of the file (``${vars.ratio}``). Resolvers, which could read
the environment or run code, are refused.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args, get_type_hints

import yaml  # type: ignore[import-untyped]
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenreduce.api import strategy_class, strategy_info
from tokenreduce.budget import COSTS
from tokenreduce.capabilities import STAGE_KEYS
from tokenreduce.errors import PipelineError, TokenReduceError, did_you_mean
from tokenreduce.pipeline import PIPELINE_FILE, ModelSettings, Pipeline
from tokenreduce.plugins import installed
from tokenreduce.reducer import BUDGET_FIELDS, Reducer
from tokenreduce.stage import Stage

_FRACTION = re.compile(r"\d+/0*[1-9]\d*")


@dataclass
class _FileSchema:
    """The framework's own keys of a file; their values are checked one level further down."""

    vars: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    reduce: list[Any] = MISSING


def load_pipeline(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Pipeline:
    """Read and check a pipeline. Nothing of a model is loaded.

    Args:
        source: a YAML file, a folder that a built pipeline was saved to, the name of a registered
            preset, a strategy's preset (``"visionzip@official-64"``), or a mapping of the same
            structure.
        overrides: ``"key.path=value"`` items that replace or add values, as in
            ``"reduce.0.reduction=8"`` or ``"model.dtype=float32"``; values are YAML, and ``null``
            takes a value back.

    Raises:
        PipelineError: if there is no such file, or its content is invalid.
        BudgetError: if a stage's budget is missing, contradictory or out of range.
        UnknownName: if a strategy, adapter or backend is not registered.
        UnsupportedSite: if a strategy does not run at its stage's site.
        MissingExtra: if a strategy needs a package that is not installed.
    """
    label, config = _read(source)
    root = _Place(label)
    if not isinstance(config, DictConfig):
        raise PipelineError(f"{root}: must be a mapping with the key 'reduce'.")
    _refuse_resolvers(root, OmegaConf.to_container(config, resolve=False))
    for override in overrides:
        _override(root, config, override)
    # Again: an override's YAML escapes may spell out what its text did not show.
    _refuse_resolvers(root, OmegaConf.to_container(config, resolve=False))
    with _located(root):
        data = cast(
            dict[str, Any],
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True),
        )
    known = [f.name for f in dataclasses.fields(_FileSchema)]
    _refuse_unknown(root, data, known)
    if not isinstance(data.get("reduce"), list):
        raise PipelineError(
            f"{root}: needs the key 'reduce' with a list of stages, as in "
            "'reduce: [{strategy: NAME, reduction: 16}]'."
        )
    parts = data.pop("reduce")
    top = _typed(_FileSchema, data, root)
    model = None if top.get("model") is None else _model(top["model"], root / "model")
    if not parts:
        raise PipelineError(f"{root / 'reduce'}: needs at least one stage.")
    stages = [_stage(part, root / "reduce" / i) for i, part in enumerate(parts)]
    return Pipeline(
        stages=tuple(stages),
        model=model,
        variables=MappingProxyType(top.get("vars") or {}),
        source=label,
    )


def dump_pipeline(pipeline: Pipeline) -> str:
    """Write a pipeline as YAML that :func:`load_pipeline` reads back to an equal one.

    What equals its default is left out.

    Raises:
        PipelineError: if a strategy is not registered, or a value cannot be written as YAML.
    """
    root = _Place(pipeline.source or "pipeline")
    data: dict[str, Any] = {}
    if pipeline.variables:
        data["vars"] = _plain(pipeline.variables, root / "vars")
    if pipeline.model is not None:
        data["model"] = _changed(pipeline.model, root / "model")
    stages = [_dump_stage(stage, root / "reduce" / i) for i, stage in enumerate(pipeline.stages)]
    data["reduce"] = stages
    return OmegaConf.to_yaml(OmegaConf.create(data))


def load_stage(data: Mapping[str, Any], label: str = "stage") -> Stage:
    """Read and check one stage, given as an entry of a pipeline's ``reduce``.

    Args:
        data: the strategy, its options, and the keys of its stage.
        label: what errors call it.

    Raises:
        TokenReduceError: as :func:`load_pipeline` does.
    """
    root = _Place(label)
    config = _create(label, data)
    _refuse_resolvers(root, OmegaConf.to_container(config, resolve=False))
    with _located(root):
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return _stage(plain, root)


def dump_stage(stage: Stage, label: str = "stage") -> dict[str, Any]:
    """Write one stage as :func:`load_stage` reads it, without what equals its default.

    Raises:
        PipelineError: if a strategy is not registered, or a value cannot be written as YAML.
    """
    return _dump_stage(stage, _Place(label))


@dataclass(frozen=True)
class _Place:
    """A file and a key path in it, for error messages."""

    label: str
    path: str = ""

    def __truediv__(self, key: str | int) -> _Place:
        step = f"[{key}]" if isinstance(key, int) else f".{key}" if self.path else str(key)
        return _Place(self.label, self.path + step)

    def inside(self, relative: str) -> _Place:
        """The place at a key path relative to this one."""
        if not relative:
            return self
        joint = "." if self.path and not relative.startswith("[") else ""
        return _Place(self.label, self.path + joint + relative)

    def __str__(self) -> str:
        return f"{self.label}: {self.path}" if self.path else self.label


def _read(source: object) -> tuple[str, DictConfig | ListConfig]:
    """A label for errors, and the unresolved content."""
    if isinstance(source, Mapping):
        return "pipeline", _create("pipeline", source)
    if not isinstance(source, str | os.PathLike):
        raise PipelineError(
            f"a pipeline comes from a YAML file, a preset name or a mapping, got "
            f"{type(source).__name__}."
        )
    path = Path(source)
    presets = installed().presets
    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:
        raise PipelineError(f"{str(path)[:80]!r}: is not a path: {_reason(error)}.") from error
    if not is_file and (path / PIPELINE_FILE).is_file():
        label, config = _read(path / PIPELINE_FILE)
        if isinstance(config, DictConfig) and isinstance(config.get("model"), DictConfig):
            config["model"]["path"] = str(path)
        return label, config
    if isinstance(source, str) and not is_file and source in presets:
        preset = presets.resolve(source)
        if not isinstance(preset, Mapping):
            raise PipelineError(
                f"preset {source!r} is a {type(preset).__name__}, not a mapping. It comes from "
                f"{presets[source].distribution or presets[source].target!r}."
            )
        return f"preset {source!r}", _create(f"preset {source!r}", preset)
    strategy, at, preset = str(source).partition("@")
    if not is_file and at and strategy in installed().strategies:
        entry = {"strategy": strategy, "preset": preset}
        return f"preset {source!r}", _create(f"preset {source!r}", {"reduce": [entry]})
    if not is_file:
        folder = path.parent if path.parent.is_dir() else Path()
        near = [str(folder / found.name) for found in folder.glob("*.y*ml")]
        raise PipelineError(
            f"{path}: no such pipeline file or preset. "
            f"{did_you_mean(str(source), [*near, *presets])}"
        )
    try:
        return str(path), OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise PipelineError(f"{path}: is not valid YAML: {_reason(error)}.") from error
    except (OSError, RecursionError) as error:
        raise PipelineError(f"{path}: cannot be read: {_reason(error)}.") from error


def _create(label: str, mapping: Mapping[Any, Any]) -> DictConfig:
    try:
        if isinstance(mapping, DictConfig):
            return cast(DictConfig, OmegaConf.create(OmegaConf.to_container(mapping)))
        return OmegaConf.create(dict(mapping), flags={"allow_objects": True})
    except (OmegaConfBaseException, RecursionError) as error:
        raise PipelineError(f"{label}: {_reason(error)}.") from error


def _override(root: _Place, config: DictConfig, override: str) -> None:
    place = _Place(f"override {override!r} of {root}")
    key, equals, value = override.partition("=")
    if not equals or not key or any(not step for step in re.split(r"[.\[]", key)):
        raise PipelineError(f"{place}: is not 'key.path=value', as in 'reduce.0.reduction=8'.")
    _refuse_resolvers(place, value)
    try:
        config.merge_with_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, IndexError) as error:
        raise PipelineError(f"{place}: {_reason(error)}.") from error


def _refuse_resolvers(place: _Place, value: object) -> None:
    """Refuse any ``${name:...}`` before anything is resolved."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_resolvers(place / str(key), item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_resolvers(place / i, item)
    elif isinstance(value, str) and _calls_resolver(value):
        raise PipelineError(
            f"{place}: {value!r} calls a resolver. Resolvers can read the environment or run "
            "code, so pipelines have none: refer to values of the same file, as in "
            "'${vars.ratio}'."
        )


def _calls_resolver(text: str) -> bool:
    """Whether a colon stands inside ``${...}``, which is what makes it a resolver's call."""
    depth = 0
    for i, character in enumerate(text):
        if text.startswith("${", i):
            depth += 1
        elif character == "}":
            depth = max(0, depth - 1)
        elif character == ":" and depth:
            return True
    return False


def _refuse_unknown(
    place: _Place, data: Mapping[Any, Any], known: Sequence[str], what: str = "unknown key"
) -> None:
    for key in data:
        if key not in known:
            raise PipelineError(f"{place / str(key)}: {what}. {did_you_mean(str(key), known)}")


def _model(data: dict[str, Any], place: _Place) -> ModelSettings:
    known = [f.name for f in dataclasses.fields(ModelSettings)]
    _refuse_unknown(place, data, known)
    if data.get("path") is None:
        raise PipelineError(f"{place}: needs the key 'path', a local folder or a hub name.")
    settings = _typed(ModelSettings, data, place)
    with _located(place):
        return ModelSettings(**settings)


def _stage(data: object, place: _Place) -> Stage:
    own: dict[str, Any] = {}
    data = _with_preset(data, place)
    if isinstance(data, dict):
        own = {key: data[key] for key in STAGE_KEYS if data.get(key) is not None}
        if isinstance(own.get("schedule"), dict):
            own["schedule"] = {
                _budget_value(n): _budget_value(share) for n, share in own["schedule"].items()
            }
        if "layer" in own:
            own["layer"] = _budget_value(own["layer"])
        data = {key: value for key, value in data.items() if key not in STAGE_KEYS}
    reducer = _reducer(data, place, own_keys=STAGE_KEYS)
    with _located(place):
        stage = Stage(reducer=reducer, **own)
        stage.require_budget()
    return stage


def _reducer(data: object, place: _Place, *, own_keys: Sequence[str] = ()) -> Reducer:
    data = _with_preset(data, place)
    if not isinstance(data, dict):
        raise PipelineError(
            f"{place}: must be a mapping like {{strategy: NAME, reduction: 16}}, got {data!r}."
        )
    name = data.get("strategy")
    if not isinstance(name, str):
        raise PipelineError(f"{place}: needs the key 'strategy', the name of a strategy.")
    with _located(place / "strategy"):
        strategy = strategy_class(name)
    fields = [f for f in dataclasses.fields(strategy) if f.init]
    options = {key: value for key, value in data.items() if key != "strategy"}
    for key in STAGE_KEYS:
        if key in options and key not in own_keys:
            raise PipelineError(
                f"{place / key}: belongs to the stage, not to a strategy inside a wrapper."
            )
    _refuse_unknown(
        place,
        options,
        ["strategy", "preset", *own_keys, *(f.name for f in fields)],
        f"unknown key of strategy {name!r}",
    )
    hints = _hints(strategy)
    given: dict[str, Any] = {}
    for key in [key for key in options if key in BUDGET_FIELDS]:
        given[key] = _budget_value(options.pop(key))
    for key in [key for key in options if _holds_reducers(hints.get(key))]:
        given[key] = _nested(options.pop(key), place / key)
    given |= _typed(strategy, options, place)
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in given:
            raise PipelineError(f"{place}: strategy {name!r} needs the key {f.name!r}.")
    with _located(place):
        return strategy(**given)


def _nested(value: object, place: _Place) -> Reducer | tuple[Reducer, ...]:
    if isinstance(value, list):
        return tuple(_reducer(part, place / i) for i, part in enumerate(value))
    return _reducer(value, place)


def _with_preset(data: object, place: _Place) -> object:
    """A stage or an inner strategy with the options of its preset written out."""
    if not isinstance(data, dict) or "preset" not in data:
        return data
    given = {key: value for key, value in data.items() if key != "preset"}
    name, preset = given.get("strategy"), data["preset"]
    if preset is None or not isinstance(name, str):
        return given
    if not isinstance(preset, str):
        raise PipelineError(f"{place / 'preset'}: must be the name of a preset, got {preset!r}.")
    with _located(place / "preset"):
        return strategy_info(name).preset(preset, given)


def _budget_value(value: object) -> object:
    """``1/3`` is no YAML number, but the only way to write some ratios exactly."""
    if isinstance(value, str) and _FRACTION.fullmatch(value):
        return Fraction(value)
    return value


def _hints(owner: type) -> dict[str, Any]:
    try:
        return get_type_hints(owner)
    except (NameError, TypeError):
        # Annotations that name what is imported for type checkers only: not checked here.
        return {}


def _holds_reducers(hint: object) -> bool:
    if isinstance(hint, type) and not get_args(hint):
        return issubclass(hint, Reducer)
    return any(_holds_reducers(part) for part in get_args(hint))


def _typed(owner: type, given: Mapping[str, Any], place: _Place) -> dict[str, Any]:
    """Values checked against, and converted to, the annotated types of a dataclass.

    Annotations beyond OmegaConf's structured configs are left to the dataclass itself.
    """
    hints = _hints(owner)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        hint = hints.get(key, Any)
        try:
            schema = OmegaConf.structured(
                make_dataclass("Option", [("value", hint, field(default=MISSING))])
            )
        except OmegaConfBaseException:
            checked[key] = _frozen(value)
            continue
        try:
            merged = OmegaConf.merge(schema, {"value": value})
            checked[key] = _frozen(OmegaConf.to_container(merged)["value"])  # type: ignore[index,call-overload]
        except OmegaConfBaseException as error:
            at = (error.full_key or "value").removeprefix("value")
            # Of a tuple's entries, OmegaConf leaves the blanks of its message unfilled.
            reason = _reason(error).replace("$VALUE_TYPE", type(value).__name__)
            reason = reason.replace("$VALUE", str(value))
            raise PipelineError(f"{(place / key).inside(at)}: {reason}.") from error
    return checked


def _frozen(value: Any) -> Any:
    """Reducers are hashed to bucket items, so they hold tuples, not lists."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


@contextmanager
def _located(place: _Place) -> Iterator[None]:
    """Put the place before the message of whatever is raised, as an error of the same type."""
    try:
        yield
    except TokenReduceError as error:
        raise _same_type(error, f"{place}: {error}") from error
    except OmegaConfBaseException as error:
        raise PipelineError(f"{place.inside(error.full_key or '')}: {_reason(error)}.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise PipelineError(f"{place}: {_reason(error)}.") from error


def _same_type(error: TokenReduceError, message: str) -> TokenReduceError:
    try:
        return type(error)(message)
    except TypeError:
        return PipelineError(message)


def _reason(error: BaseException) -> str:
    """The message in one line, without what OmegaConf appends about its own objects."""
    text = " ".join(line.strip() for line in str(error).splitlines())
    return text.partition(" full_key:")[0].rstrip(". ") or type(error).__name__


def _dump_stage(stage: Stage, place: _Place) -> dict[str, Any]:
    entry = _dump_reducer(stage.reducer, place)
    keys = ("site", "total", "layer", *COSTS)
    own: dict[str, Any] = {key: _written(getattr(stage, key)) for key in keys}
    if stage.schedule is not None:
        own["schedule"] = {
            _written(n): _written(share) for n, share in dict(stage.schedule).items()
        }
    own = {key: value for key, value in own.items() if value is not None}
    return {"strategy": entry.pop("strategy"), **own, **entry}


def _dump_reducer(reducer: Reducer, place: _Place) -> dict[str, Any]:
    name = reducer.name
    if name not in installed().strategies or strategy_class(name) is not type(reducer):
        raise PipelineError(
            f"{place}: {type(reducer).__qualname__} is not a registered strategy, so a file cannot "
            "name it. Register it through the hook register_strategies."
        )
    return {"strategy": name, **_changed(reducer, place)}


def _changed(settings: ModelSettings | Reducer, place: _Place) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    entry: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        factory = f.default_factory
        default = f.default if factory is dataclasses.MISSING else factory()
        if f.init and (default is dataclasses.MISSING or value != default):
            if f.name in BUDGET_FIELDS:
                value = _written(value)
            entry[f.name] = _plain(value, place / f.name)
    return entry


def _written(share: Any) -> Any:
    """A budget as YAML can hold it: a fraction is written out."""
    if isinstance(share, Fraction):
        return f"{share.numerator}/{share.denominator}"
    return share


_SCALARS: tuple[type, ...] = (str, bool, int, float, type(None))


def _plain(value: Any, place: _Place) -> Any:
    if isinstance(value, Reducer):
        return _dump_reducer(value, place)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, place / key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, place / i) for i, item in enumerate(value)]
    if type(value) in _SCALARS and not (isinstance(value, str) and "${" in value):
        return value
    raise PipelineError(f"{place}: {value!r} cannot be written as YAML.")

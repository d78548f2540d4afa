"""TokenReduce: fewer visual tokens for multimodal LLMs, without training.

    import tokenreduce as tr

    reducer = tr.create_strategy("lftr", reduction=16)
    with tr.attach(model, reducer) as run:
        model.generate(**inputs)
    print(run.receipt)

Names are imported on first use, so that ``import tokenreduce`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tokenreduce._version import __version__

if TYPE_CHECKING:
    from tokenreduce.api import create_strategy as create_strategy
    from tokenreduce.api import list_strategies as list_strategies
    from tokenreduce.api import strategy_info as strategy_info
    from tokenreduce.attachment import Attachment as Attachment
    from tokenreduce.attachment import ItemReduction as ItemReduction
    from tokenreduce.attachment import attach as attach
    from tokenreduce.budget import Budget as Budget
    from tokenreduce.capabilities import StrategyRecord as StrategyRecord
    from tokenreduce.config import dump_pipeline as dump_pipeline
    from tokenreduce.config import load_pipeline as load_pipeline
    from tokenreduce.errors import TokenReduceError as TokenReduceError
    from tokenreduce.hookspecs import PLUGIN_API_VERSION as PLUGIN_API_VERSION
    from tokenreduce.hookspecs import hookimpl as hookimpl
    from tokenreduce.neighbors import nearest as nearest
    from tokenreduce.packing import PackedTokens as PackedTokens
    from tokenreduce.packing import reduce_packed as reduce_packed
    from tokenreduce.pipeline import BuiltPipeline as BuiltPipeline
    from tokenreduce.pipeline import ModelSettings as ModelSettings
    from tokenreduce.pipeline import Pipeline as Pipeline
    from tokenreduce.receipt import Receipt as Receipt
    from tokenreduce.reducer import Grouping as Grouping
    from tokenreduce.reducer import Merger as Merger
    from tokenreduce.reducer import Reducer as Reducer
    from tokenreduce.reducer import Scorer as Scorer
    from tokenreduce.reducer import Selector as Selector
    from tokenreduce.reduction import Reduction as Reduction
    from tokenreduce.stage import Stage as Stage
    from tokenreduce.stream import TokenStream as TokenStream
    from tokenreduce.tokens import Layout as Layout
    from tokenreduce.tokens import VisualTokens as VisualTokens
    from tokenreduce.wrappers import chain as chain
    from tokenreduce.wrappers import per_frame as per_frame
    from tokenreduce.wrappers import per_segment as per_segment
    from tokenreduce.wrappers import per_tile as per_tile

_HOMES = {
    "api": ("create_strategy", "list_strategies", "strategy_info"),
    "attachment": ("Attachment", "ItemReduction", "attach"),
    "budget": ("Budget",),
    "capabilities": ("StrategyRecord",),
    "config": ("dump_pipeline", "load_pipeline"),
    "errors": ("TokenReduceError",),
    "hookspecs": ("PLUGIN_API_VERSION", "hookimpl"),
    "neighbors": ("nearest",),
    "packing": ("PackedTokens", "reduce_packed"),
    "pipeline": ("BuiltPipeline", "ModelSettings", "Pipeline"),
    "receipt": ("Receipt",),
    "reducer": ("Grouping", "Merger", "Reducer", "Scorer", "Selector"),
    "reduction": ("Reduction",),
    "stage": ("Stage",),
    "stream": ("TokenStream",),
    "tokens": ("Layout", "VisualTokens"),
    "wrappers": ("chain", "per_frame", "per_segment", "per_tile"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'tokenreduce' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tokenreduce.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

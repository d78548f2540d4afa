import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from tokenreduce.api import create_strategy
from tokenreduce.config import dump_pipeline, dump_stage, load_pipeline, load_stage
from tokenreduce.errors import (
    BudgetError,
    MissingExtra,
    PipelineError,
    TokenReduceError,
    UnknownName,
    UnsupportedSite,
)
from tokenreduce.hookspecs import hookimpl
from tokenreduce.pipeline import ModelSettings, Pipeline
from tokenreduce.reducer import Reducer, Scorer
from tokenreduce.stage import Stage
from tokenreduce.tokens import VisualTokens
from tokenreduce.wrappers import Chain, PerFrame

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "pipelines").glob("*.yaml"))


def one(**stage: Any) -> dict[str, Any]:
    """A pipeline of one stage."""
    return {"reduce": [{"strategy": "norm-topk", **stage}]}


# -- third parties --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Peculiar(Scorer):
    """A strategy with options of every kind."""

    mode: Literal["first", "last"] = "first"
    weights: tuple[float, ...] = (1.0,)
    layers: list[int] | None = None
    anything: Mapping[str, int] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weights:
            raise ValueError("weights must not be empty")

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features.float().norm(dim=-1)


class EightBit:
    """A quantizer that needs a GPU."""

    def load_arguments(
        self, options: Mapping[str, Any], *, device: torch.device, model: nn.Module
    ) -> Mapping[str, Any]:
        if device.type != "cuda":
            raise PipelineError(f"eight-bit weights need CUDA, the model goes to {device}.")
        return {"quantization_config": dict(options)}


class HalfDepth:
    """An encoder pruner that drops the last layers."""

    def check(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        raise PipelineError(f"cannot keep {options['keep']} of the layers.")

    def prune(self, model: nn.Module, options: Mapping[str, Any], processor: Any) -> None:
        raise NotImplementedError


class Plugin:
    """Everything that a pipeline can name of a third party."""

    @staticmethod
    @hookimpl
    def register_strategies(register: Any) -> None:
        presets = {
            "last-3": {"mode": "last", "weights": [3], "keep": 3},
            "deep": {"site": "decoder", "layer": 2, "keep_ratio": 0.5},
            "steps": {"site": "decoder", "schedule": {2: "1/3", 4: 0}},
        }
        register(
            "peculiar",
            f"{__name__}:Peculiar",
            summary="Peculiar.",
            sites=("projector", "decoder"),
            presets=presets,
        )
        register("needs-extra", "acme_on_gpu:X", summary="Extra.", extra="gpu")
        register("no-reducer", f"{__name__}:EightBit", summary="Wrong.")

    @staticmethod
    @hookimpl
    def register_quantizers(register: Any) -> None:
        register("eight-bit", f"{__name__}:EightBit")

    @staticmethod
    @hookimpl
    def register_encoder_pruners(register: Any) -> None:
        register("half-depth", f"{__name__}:HalfDepth")

    @staticmethod
    @hookimpl
    def register_presets(register: Any) -> None:
        register("acme-fast", f"{__name__}:PRESET")
        register("acme-broken", f"{__name__}:ROOT")


PRESET = {"reduce": [{"strategy": "norm-topk", "reduction": 16}]}


@pytest.fixture
def acme(install: Any, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("acme")
    (folder / "acme_on_gpu.py").write_text("import acme_gpu_library")
    monkeypatch.syspath_prepend(folder)
    status = install(**{k: v.__func__ for k, v in vars(Plugin).items() if "register" in k})
    assert status.state == "loaded", status.error


# -- what works ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_parse(path: Path) -> None:
    pipeline = load_pipeline(path)
    assert pipeline.model is not None
    assert load_pipeline(str(path)) == pipeline
    assert pipeline.source == str(path)


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {
        "divprune_qwen25",
        "lftr_16x",
        "per_frame_video",
        "testbed",
    }


def test_a_file_becomes_stages(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        """
        vars: {ratio: 0.25, type: bfloat16}
        model: {path: some/model, dtype: "${vars.type}", allow_pickle: false}
        reduce:
          - {strategy: norm-topk, keep_ratio: "${vars.ratio}", total: 64}
          - strategy: per-frame
            inner: {strategy: norm-topk}
            reduction: 4
          - strategy: chain
            reducers:
              - {strategy: norm-topk, keep: 16}
              - {strategy: norm-topk, keep_ratio: 1/3}
        """
    )
    pipeline = load_pipeline(file)
    first, second, third = pipeline.stages
    assert pipeline.model == ModelSettings(path="some/model", dtype="bfloat16")
    assert pipeline.model.torch_dtype == torch.bfloat16
    assert first.reducer.keep_ratio == 0.25
    assert first.total == 64
    assert first.site == "projector"
    assert isinstance(second.reducer, PerFrame)
    assert second.reducer.inner.name == "norm-topk"
    assert isinstance(third.reducer, Chain)
    assert third.reducer.reducers[1].count(10) == 3
    assert pipeline.variables == {"ratio": 0.25, "type": "bfloat16"}


def test_overrides_reach_into_lists() -> None:
    pipeline = load_pipeline(
        one(reduction=4) | {"model": {"path": "x"}},
        ["reduce.0.reduction=null", "reduce[0].keep=8", "model.dtype=float32", "vars.seed=3"],
    )
    assert pipeline.stages[0].reducer.keep == 8
    assert pipeline.model is not None
    assert pipeline.model.dtype == "float32"
    assert pipeline.variables == {"seed": 3}


def test_an_override_may_interpolate() -> None:
    pipeline = load_pipeline({"vars": {"k": 5}, **one(keep=1)}, ["reduce.0.keep=${vars.k}"])
    assert pipeline.stages[0].reducer.keep == 5


def test_total_alone_is_a_budget() -> None:
    assert load_pipeline(one(total=64)).stages[0].total == 64


@pytest.mark.usefixtures("acme")
def test_options_of_third_parties_are_typed() -> None:
    pipeline = load_pipeline(
        {
            "reduce": [
                {
                    "strategy": "peculiar",
                    "keep": 3,
                    "mode": "last",
                    "weights": [1, 2],
                    "layers": [3],
                    "strict": "yes",
                }
            ]
        }
    )
    reducer = pipeline.stages[0].reducer
    assert reducer == Peculiar(
        keep=3,
        mode="last",
        weights=(1.0, 2.0),
        layers=(3,),
        strict=True,  # type: ignore[arg-type]
    )
    hash(reducer)


@pytest.mark.usefixtures("acme")
def test_presets() -> None:
    assert load_pipeline("acme-fast").stages[0].reducer.reduction == 16
    assert load_pipeline("acme-fast", ["reduce.0.reduction=2"]).stages[0].reducer.reduction == 2
    assert PRESET["reduce"][0]["reduction"] == 16


def peculiar(**given: Any) -> Stage:
    """The only stage of a pipeline with a preset."""
    return load_pipeline({"reduce": [{"strategy": "peculiar", **given}]}).stages[0]


@pytest.mark.usefixtures("acme")
def test_presets_of_a_strategy() -> None:
    last = Peculiar(mode="last", weights=(3.0,), keep=3)
    assert peculiar(preset="last-3").reducer == last
    assert load_pipeline("peculiar@last-3").stages[0].reducer == last
    assert create_strategy("peculiar", preset="last-3") == last
    assert peculiar(preset=None, keep=3).reducer == Peculiar(keep=3)
    wrapped = load_pipeline(
        {
            "reduce": [
                {"strategy": "per-frame", "inner": {"strategy": "peculiar", "preset": "last-3"}}
            ]
        }
    )
    assert next(wrapped.stages[0].reducer.inner_reducers()) == last
    pipeline = load_pipeline("peculiar@last-3")
    again = load_pipeline(yaml.safe_load(dump_pipeline(pipeline)))
    assert again.stages == pipeline.stages


@pytest.mark.usefixtures("acme")
def test_what_is_given_goes_before_a_preset() -> None:
    assert peculiar(preset="last-3", mode="first").reducer.options()["mode"] == "first"
    # A budget replaces a budget, however it is stated.
    quarter = create_strategy("peculiar", preset="last-3", keep_ratio=0.25)
    assert quarter == Peculiar(mode="last", weights=(3.0,), keep_ratio=0.25)
    assert peculiar(preset="last-3", total=9).reducer.budget is None
    assert peculiar(preset="deep", layer=3).layer == 3
    assert peculiar(preset="deep", schedule={1: 0.5}).layer is None
    steps = peculiar(preset="steps", layer=2, keep=4)
    assert (steps.layer, steps.reducer.keep, steps.schedule) == (2, 4, None)
    overridden = load_pipeline("peculiar@deep", ["reduce.0.layer=5", "model.path=x"])
    assert overridden.stages[0].layer == 5


@pytest.mark.usefixtures("acme")
def test_presets_of_a_stage() -> None:
    assert peculiar(preset="deep").layer == 2
    assert peculiar(preset="steps").schedule == ((2, Fraction(1, 3)), (4, 0))
    # What belongs to the stage is no business of the strategy alone.
    assert create_strategy("peculiar", preset="deep") == Peculiar(keep_ratio=0.5)
    with pytest.raises(PipelineError, match="no option 'layer'"):
        create_strategy("peculiar", preset="deep", layer=3)


@pytest.mark.usefixtures("acme")
@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("peculiar@last-33", UnknownName, r"reduce\[0\]\.preset: .*'peculiar'.*Did you mean"),
        ("norm-topk@x", UnknownName, "no preset 'x'. Known: none"),
        ("peculiar@", UnknownName, "no preset ''"),
        ("paculiar@last-3", PipelineError, "no such pipeline file or preset"),
        (
            {"reduce": [{"strategy": "peculiar", "preset": 3}]},
            PipelineError,
            r"reduce\[0\]\.preset: must be the name of a preset, got 3",
        ),
        (
            {
                "reduce": [
                    {"strategy": "per-frame", "inner": {"strategy": "peculiar", "preset": "deep"}}
                ]
            },
            PipelineError,
            r"inner\.site: belongs to the stage",
        ),
    ],
)
def test_presets_that_are_none(source: Any, error: type[TokenReduceError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_pipeline(source)


@pytest.mark.usefixtures("acme")
def test_a_file_goes_before_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme-fast").write_text("reduce: [{strategy: norm-topk, keep: 1}]")
    monkeypatch.chdir(tmp_path)
    assert load_pipeline("acme-fast").stages[0].reducer.keep == 1


@pytest.mark.usefixtures("acme")
def test_backends_are_named_in_the_settings() -> None:
    settings = load_pipeline(
        one(keep=1)
        | {
            "model": {
                "path": "x",
                "quantization": {"backend": "eight-bit", "modules": ["language_model"]},
                "vision_encoder": {"prune": {"backend": "half-depth", "keep": 0.5}},
            }
        }
    ).model
    assert settings is not None
    assert settings.quantizer is not None
    assert settings.quantizer.options == {"modules": ["language_model"]}
    assert settings.encoder_pruner is not None
    assert settings.encoder_pruner.options == {"keep": 0.5}


# -- what is refused -------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, type[TokenReduceError], str]] = {
    "misspelt stage key": (
        {"reduce": [{"strategy": "norm-topk", "keep": 1}, {"strategy": "norm-topk", "keeep": 1}]},
        PipelineError,
        r"pipeline: reduce\[1\]\.keeep: .*'norm-topk'.*Did you mean 'keep'\?",
    ),
    "misspelt top key": ({"redcue": []}, PipelineError, r"redcue: .*Did you mean 'reduce'\?"),
    "misspelt model key": (
        one(keep=1) | {"model": {"path": "x", "dtyp": "float32"}},
        PipelineError,
        r"model\.dtyp: .*Did you mean 'dtype'\?",
    ),
    "unknown strategy": (
        {"reduce": [{"strategy": "norm-top", "keep": 1}]},
        UnknownName,
        r"reduce\[0\]\.strategy: .*Did you mean 'norm-topk'\?",
    ),
    "no strategy": ({"reduce": [{"keep": 1}]}, PipelineError, r"reduce\[0\]: .*'strategy'"),
    "stage is a word": ({"reduce": ["norm-topk"]}, PipelineError, r"reduce\[0\]: .*mapping"),
    "no reduce": ({"vars": {}}, PipelineError, "needs the key 'reduce'"),
    "reduce is a stage": ({"reduce": {"strategy": "tome"}}, PipelineError, "list of stages"),
    "no stage": ({"reduce": []}, PipelineError, r"reduce: needs at least one stage"),
    "no budget": (one(), BudgetError, r"reduce\[0\]: norm-topk has no budget"),
    "two budgets": (one(keep=1, reduction=2), BudgetError, r"reduce\[0\]: two budgets"),
    "budget out of range": (one(keep_ratio=1.5), BudgetError, r"reduce\[0\]: .*out of range"),
    "budget is a word": (one(keep="many"), BudgetError, r"whole number"),
    "keep nothing": (one(keep=0), BudgetError, "keep=0"),
    "no layer": (one(keep=1, site="decoder"), PipelineError, "needs layer=2"),
    "layer before the LLM": (one(keep=4, layer=2), PipelineError, "site 'projector'"),
    "schedule of nothing": (
        one(site="decoder", schedule={}),
        PipelineError,
        "maps layers to shares",
    ),
    "schedule that grows": (
        one(site="decoder", schedule={1: 0.2, 2: 0.4}),
        BudgetError,
        "more than",
    ),
    "total is nothing": (one(total=0), BudgetError, r"reduce\[0\]: total=0"),
    "unknown site": (one(keep=1, site="middle"), UnsupportedSite, r"reduce\[0\]: .*'middle'"),
    "wrong site": (one(keep=1, site="vision"), UnsupportedSite, r"reduce\[0\]: .*'vision'"),
    "missing option": (
        {"reduce": [{"strategy": "per-frame", "keep": 9}]},
        PipelineError,
        r"reduce\[0\]: strategy 'per-frame' needs the key 'inner'",
    ),
    "misspelt inner key": (
        {"reduce": [{"strategy": "per-frame", "inner": {"strategy": "norm-topk", "kep": 3}}]},
        PipelineError,
        r"reduce\[0\]\.inner\.kep: ",
    ),
    "stage key inside": (
        {"reduce": [{"strategy": "per-frame", "inner": {"strategy": "norm-topk", "total": 3}}]},
        PipelineError,
        r"reduce\[0\]\.inner\.total: belongs to the stage",
    ),
    "inner without budget": (
        {"reduce": [{"strategy": "per-frame", "inner": {"strategy": "norm-topk"}}]},
        BudgetError,
        r"reduce\[0\]: .*no budget",
    ),
    "one of a chain without budget": (
        {"reduce": [{"strategy": "chain", "reducers": [{"strategy": "norm-topk"}]}]},
        BudgetError,
        r"reduce\[0\]: norm-topk has no budget",
    ),
    "misspelt in a chain": (
        {"reduce": [{"strategy": "chain", "reducers": [{"strategy": "norm-topc"}]}]},
        UnknownName,
        r"reduce\[0\]\.reducers\[0\]\.strategy: ",
    ),
    "budgets on two levels": (
        {"reduce": [{"strategy": "per-frame", "keep": 9, "inner": one(keep=1)["reduce"][0]}]},
        BudgetError,
        r"reduce\[0\]: two budgets",
    ),
    "total of a chain": (
        {"reduce": [{"strategy": "chain", "total": 4, "reducers": one(keep=1)["reduce"]}]},
        BudgetError,
        r"reduce\[0\]: .*total=4",
    ),
    "option of wrong type": (
        {
            "reduce": [
                {
                    "strategy": "per-segment",
                    "keep": 9,
                    "frames": "many",
                    "inner": {"strategy": "norm-topk"},
                }
            ]
        },
        PipelineError,
        r"reduce\[0\]\.frames: .*'many'",
    ),
    "interpolation to nowhere": (
        one(keep="${vars.k}"),
        PipelineError,
        r"reduce\[0\]\.keep: .*'vars\.k' not found",
    ),
    "interpolation in a circle": (
        {"vars": {"a": "${vars.b}", "b": "${vars.a}"}, **one(keep=1)},
        PipelineError,
        r"vars\.",
    ),
    "interpolation not closed": (one(keep="${vars.k"), PipelineError, "pipeline"),
    "placeholder": (one(keep="???"), PipelineError, r"reduce\[0\]\.keep"),
    "no model path": (one(keep=1) | {"model": {}}, PipelineError, r"model: needs the key 'path'"),
    "model is a word": (one(keep=1) | {"model": "x/y"}, PipelineError, r"model: "),
    "dtype": (
        one(keep=1) | {"model": {"path": "x", "dtype": "float23"}},
        PipelineError,
        r"model: dtype 'float23'.*'float32'",
    ),
    "integer dtype": (
        one(keep=1) | {"model": {"path": "x", "dtype": "int8"}},
        PipelineError,
        r"model: dtype 'int8'",
    ),
    "device": (
        one(keep=1) | {"model": {"path": "x", "device": "quantum"}},
        PipelineError,
        r"model: device 'quantum'",
    ),
    "adapter": (
        one(keep=1) | {"model": {"path": "x", "adapter": "transformer"}},
        UnknownName,
        r"model: unknown model adapter .*'transformers'",
    ),
    "flag": (
        one(keep=1) | {"model": {"path": "x", "allow_pickle": "maybe"}},
        PipelineError,
        r"model\.allow_pickle: ",
    ),
    "quantizer": (
        one(keep=1) | {"model": {"path": "x", "quantization": {"backend": "none-such"}}},
        UnknownName,
        r"model: unknown quantizer 'none-such'",
    ),
    "quantizer without name": (
        one(keep=1) | {"model": {"path": "x", "quantization": {"scheme": "int8"}}},
        PipelineError,
        r"model: quantization must be a mapping that names a backend",
    ),
    "pruner": (
        one(keep=1)
        | {"model": {"path": "x", "vision_encoder": {"prune": {"backend": "none-such"}}}},
        UnknownName,
        r"model: unknown encoder pruner 'none-such'",
    ),
    "pruner key": (
        one(keep=1) | {"model": {"path": "x", "vision_encoder": {"prun": {}}}},
        PipelineError,
        r"model: vision_encoder has no key 'prun'. Did you mean 'prune'\?",
    ),
    "number as key": (one(keep=1) | {3: 4}, PipelineError, "3: unknown key"),
    "no pipeline": (17, PipelineError, "a YAML file, a preset name or a mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_place_and_reason(case: str) -> None:
    source, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        load_pipeline(source)


RESOLVERS = (
    "${oc.env:HOME}",
    "${ oc.env : HOME }",
    "a ${oc.decode:'1'} b",
    "${oc.create:{a:1}}",
    "${oc.${vars.kind}:HOME}",
    "${vars.${oc.env:HOME}}",
    "${custom:}",
)


@pytest.mark.parametrize("text", RESOLVERS)
@pytest.mark.parametrize("where", ["vars", "stage", "key of an override", "override"])
def test_resolvers_are_refused(text: str, where: str) -> None:
    source: dict[str, Any] = {"vars": {"kind": "env"}, **one(keep=1)}
    overrides = []
    if where == "vars":
        source["vars"]["deep"] = [{"x": text}]
    elif where == "stage":
        source["reduce"][0]["keep"] = text
    elif where == "override":
        overrides = [f"reduce.0.keep='{text}'" if "'" not in text else f"vars.z={text}"]
    else:
        source["vars"]["link"] = text
        overrides = ["vars.link.x=1"]
    with pytest.raises(PipelineError, match="resolver"):
        load_pipeline(source, overrides)


@pytest.mark.parametrize("escape", [r"\x24{oc.env:HOME}", r"${oc.env\x3aHOME}", r"\u0024{a:b}"])
def test_resolvers_spelled_with_escapes_are_refused(escape: str) -> None:
    with pytest.raises(PipelineError, match="resolver"):
        load_pipeline({"vars": {"x": 1}, **one(keep=1)}, [f'vars.x="{escape}"'])


def test_sources_that_are_no_path_are_refused() -> None:
    with pytest.raises(PipelineError, match="not a path"):
        load_pipeline("x" * 5000)


def test_a_config_object_is_a_mapping_like_others() -> None:
    assert load_pipeline(OmegaConf.create(one(keep=3))) == load_pipeline(one(keep=3))
    with pytest.raises(PipelineError, match="resolver"):
        load_pipeline(OmegaConf.create(one(keep="${oc.env:HOME}")))


def test_a_colon_beside_an_interpolation_is_no_resolver() -> None:
    pipeline = load_pipeline(
        {"vars": {"a": "x", "b": "http://y:${vars.a}: z"}, **one(keep=1)},
    )
    assert pipeline.variables["b"] == "http://y:x: z"


@pytest.mark.parametrize(
    "override",
    ["reduce.3.keep=1", "reduce.x.keep=1", "noequals", "=5", "a..b=3", "vars.k=[1,", "reduce.=1"],
)
def test_bad_overrides(override: str) -> None:
    with pytest.raises(PipelineError, match=re.escape(f"override {override!r} of pipeline")):
        load_pipeline({"vars": {}, **one(keep=1)}, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reduce: [", "not valid YAML: .*line 2"),
        ("vars: {}\nvars: {}", "duplicate key"),
        ("- strategy", "must be a mapping"),
        ("x: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("", "needs the key 'reduce'"),
        ("reduce: &a [*a]", "bad.yaml"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(PipelineError, match=message) as caught:
        load_pipeline(file)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"\xff\xfe\x00reduce")
    with pytest.raises(PipelineError, match=r"bad\.yaml"):
        load_pipeline(file)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "lftr_16x.yaml").touch()
    with pytest.raises(PipelineError, match=r"Did you mean .*lftr_16x\.yaml"):
        load_pipeline(tmp_path / "lftr_16.yaml")


@pytest.mark.usefixtures("acme")
@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("acme-fasst", PipelineError, "Did you mean 'acme-fast'"),
        ("acme-broken", PipelineError, "not a mapping.*acme 1.0"),
        ({"reduce": [{"strategy": "needs-extra"}]}, MissingExtra, r"pip install 'acme\[gpu\]'"),
        (
            {"reduce": [{"strategy": "no-reducer"}]},
            TokenReduceError,
            r"reduce\[0\]\.strategy: .*not a class derived from",
        ),
        (
            {"reduce": [{"strategy": "peculiar", "keep": 1, "mode": "middle"}]},
            PipelineError,
            r"reduce\[0\]\.mode: .*'middle'",
        ),
        (
            {"reduce": [{"strategy": "peculiar", "keep": 1, "weights": ["x"]}]},
            PipelineError,
            r"reduce\[0\]\.weights: Value '\['x'\]'",
        ),
        (
            {"reduce": [{"strategy": "peculiar", "keep": 1, "weights": []}]},
            PipelineError,
            r"reduce\[0\]: weights must not be empty",
        ),
    ],
)
def test_third_parties_are_refused_alike(
    source: Any, error: type[TokenReduceError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_pipeline(source)


def test_an_unknown_backend_names_what_is_registered(acme: None) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'eight-bit'"):
        ModelSettings(path="x", quantization={"backend": "eigth-bit"})


# -- writing ---------------------------------------------------------------------------------

budgets = st.one_of(
    st.fixed_dictionaries({"keep": st.integers(1, 10**6)}),
    st.fixed_dictionaries({"keep_ratio": st.floats(1e-6, 1.0)}),
    st.fixed_dictionaries({"reduction": st.fractions(1, 100, max_denominator=997)}),
)


@st.composite
def reducers(draw: Any) -> Reducer:
    from tokenreduce.api import create_strategy

    kind = draw(st.sampled_from(["norm-topk", "per-segment", "chain"]))
    if kind == "chain":
        parts = [create_strategy("norm-topk", **draw(budgets)) for _ in range(2)]
        return create_strategy("chain", reducers=tuple(parts))
    budget = draw(budgets)
    if kind == "per-segment":
        inner = create_strategy("norm-topk")
        return create_strategy(kind, inner=inner, frames=draw(st.integers(1, 99)), **budget)
    return create_strategy(kind, **budget)


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1).filter(
    lambda text: "${" not in text and text.strip("?") and not text.endswith("\\")
)


@given(
    stages=st.lists(st.builds(lambda r: Stage(reducer=r), reducers()), min_size=1, max_size=3),
    model=st.none()
    | st.builds(
        lambda path, dtype, pickle: ModelSettings(path=path, dtype=dtype, allow_pickle=pickle),
        texts,
        st.sampled_from(["auto", "float32"]),
        st.booleans(),
    ),
    variables=st.dictionaries(
        st.text("abc", min_size=1), st.none() | st.booleans() | st.integers() | texts, max_size=3
    ),
)
def test_what_is_written_loads_to_an_equal_pipeline(
    tmp_path_factory: pytest.TempPathFactory,
    stages: list[Stage],
    model: ModelSettings | None,
    variables: dict[str, Any],
) -> None:
    pipeline = Pipeline(stages=tuple(stages), model=model, variables=variables)
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(dump_pipeline(pipeline), encoding="utf-8")
    assert load_pipeline(file) == pipeline


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_survive_writing(tmp_path: Path, path: Path) -> None:
    pipeline = load_pipeline(path)
    (tmp_path / "again.yaml").write_text(dump_pipeline(pipeline))
    assert load_pipeline(tmp_path / "again.yaml") == pipeline


def test_writing_leaves_out_defaults() -> None:
    text = dump_pipeline(load_pipeline(one(reduction=16)))
    assert text == "reduce:\n- strategy: norm-topk\n  site: projector\n  reduction: 16\n"


def test_a_schedule_survives_writing() -> None:
    exact = load_pipeline(one(site="decoder", schedule={8: "1/3"}))
    assert exact.stages[0].schedule == ((8, Fraction(1, 3)),)
    assert load_pipeline(yaml.safe_load(dump_pipeline(exact))) == exact
    pipeline = load_pipeline(one(site="decoder", schedule={8: 0.5, 2: 1, 16: 0}))
    assert pipeline.stages[0].layers == (2, 8, 16)
    assert "schedule:\n    2: 1\n    8: 0.5\n    16: 0" in dump_pipeline(pipeline)
    assert load_pipeline(yaml.safe_load(dump_pipeline(pipeline))) == pipeline
    plain = load_pipeline(one(site="decoder", layer=2, keep_ratio=0.5))
    assert load_pipeline(yaml.safe_load(dump_pipeline(plain))) == plain


def test_shares_of_the_depth_survive_writing(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        "reduce:\n- {strategy: norm-topk, site: decoder, schedule: {0.25: 0.5, 1/3: 1/4}}\n"
    )
    pipeline = load_pipeline(file)
    assert pipeline.stages[0].schedule == ((0.25, 0.5), (Fraction(1, 3), Fraction(1, 4)))
    written = dump_pipeline(pipeline)
    assert load_pipeline(yaml.safe_load(written)).stages == pipeline.stages
    for layer, expected in ((0.25, 0.25), ("1/3", Fraction(1, 3))):
        pipeline = load_pipeline(one(site="decoder", layer=layer, keep_ratio=0.5))
        assert pipeline.stages[0].layer == expected
        assert load_pipeline(yaml.safe_load(dump_pipeline(pipeline))) == pipeline


def test_a_fraction_stays_exact() -> None:
    text = dump_pipeline(load_pipeline(one(keep_ratio=Fraction(1, 3))))
    assert "keep_ratio: 1/3" in text


def test_a_class_that_nobody_registered_cannot_be_written() -> None:
    pipeline = Pipeline(stages=(Stage(reducer=Peculiar(keep=1)),))
    with pytest.raises(PipelineError, match=r"reduce\[0\]: Peculiar is not a registered strategy"):
        dump_pipeline(pipeline)


@pytest.mark.usefixtures("acme")
def test_a_value_that_yaml_cannot_hold_is_named() -> None:
    pipeline = Pipeline(stages=(Stage(reducer=Peculiar(keep=1, anything={1: 2})),))  # type: ignore[dict-item]
    with pytest.raises(PipelineError, match=r"reduce\[0\]\.anything"):
        dump_pipeline(pipeline)


# -- pipelines in Python ---------------------------------------------------------------------


def test_a_pipeline_takes_reducers() -> None:
    from tokenreduce.api import create_strategy

    reducer = create_strategy("norm-topk", keep=3)
    assert Pipeline(stages=(reducer,)).stages == (Stage(reducer=reducer),)  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [(), ("norm-topk",), (3,)])
def test_a_pipeline_is_made_of_stages(stages: Any) -> None:
    with pytest.raises(PipelineError):
        Pipeline(stages=stages)


def test_build_without_a_model() -> None:
    with pytest.raises(PipelineError, match="names no model"):
        load_pipeline(one(keep=1)).build()


def test_one_stage_reads_as_an_entry_of_a_pipeline() -> None:
    given = {"strategy": "random", "reduction": "7/3", "seed": 4, "total": 9}
    stage = load_stage(given)
    assert (stage,) == load_pipeline({"reduce": [given]}).stages
    assert dump_stage(stage) == {"site": "projector", **given}
    assert load_stage(dump_stage(stage)) == stage


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${nothing}"])
def test_one_stage_has_nothing_to_refer_to(value: str) -> None:
    with pytest.raises(PipelineError, match=r"^here: "):
        load_stage({"strategy": "random", "keep": 4, "seed": value}, "here")


def test_build_of_a_path_that_is_not_there() -> None:
    with pytest.raises(PipelineError, match="no such folder"):
        load_pipeline(one(keep=1) | {"model": {"path": "/no/such/folder"}}).build()


@pytest.mark.usefixtures("acme")
def test_a_quantizer_refuses_before_anything_is_loaded() -> None:
    settings = {"path": "testbed:b", "device": "cpu", "quantization": {"backend": "eight-bit"}}
    with pytest.raises(PipelineError, match="eight-bit weights need CUDA, the model goes to cpu"):
        load_pipeline(one(keep=1) | {"model": settings}).build()

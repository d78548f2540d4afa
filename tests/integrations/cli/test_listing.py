import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from tokenreduce.hookspecs import hookimpl
from tokenreduce.plugins import installed
from tokenreduce.reducer import Scorer
from tokenreduce.tokens import VisualTokens
from tokenreduce_integrations.cli.card import read_card

LIGHT = [
    ["--help"],
    ["--version"],
    ["list"],
    ["list", "--json"],
    ["info", "norm-topk"],
    ["cite", "divprune"],
    ["info", "per-segment", "--json"],
    ["plugins"],
    ["plugins", "--json"],
    ["run", "--help"],
    ["demo", "--help"],
    ["show", "--help"],
    ["check", "--help"],
    ["new", "--help"],
]

WITHOUT_TORCH = """
import sys
from tokenreduce_integrations.cli import main
sys.argv[0] = "tokenreduce"
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = [name for name in ("torch", "transformers", "numpy", "PIL") if name in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_no_torch(arguments: list[str]) -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""


def test_help_names_every_command(tokenreduce) -> None:
    text = tokenreduce("--help").stdout
    for command in ("demo", "run", "show", "list", "info", "check", "cite", "plugins", "new"):
        assert command in text


def test_every_argument_and_option_is_explained(tokenreduce) -> None:
    from typer.main import get_command

    from tokenreduce_integrations.cli.app import app

    for name, command in get_command(app).commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_no_command_is_a_usage_error(tokenreduce) -> None:
    result = tokenreduce()
    assert result.exit_code == 2
    assert "Usage" in result.output


@pytest.mark.parametrize("arguments", [["lst"], ["list", "--sites"], ["info"]])
def test_usage_errors(tokenreduce, arguments: list[str]) -> None:
    assert tokenreduce(*arguments).exit_code == 2


def test_list_shows_every_strategy(tokenreduce) -> None:
    text = tokenreduce("list").stdout
    for name in installed().strategies:
        assert name in text


def test_list_as_json(tokenreduce) -> None:
    records = json.loads(tokenreduce("list", "--json").stdout)
    assert [record["name"] for record in records] == list(installed().strategies)
    assert records[0].keys() >= {"sites", "kind", "count", "cost", "parity", "distribution"}


def test_list_by_site_and_pattern(tokenreduce) -> None:
    records = json.loads(tokenreduce("list", "norm*", "--site", "projector", "--json").stdout)
    assert [record["name"] for record in records] == ["norm-topk"]
    result = tokenreduce("list", "--site", "head")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert (
        result.stderr == "error: unknown site 'head': one of frames, vision, projector, decoder.\n"
    )


def test_info(tokenreduce) -> None:
    text = tokenreduce("info", "norm-topk").stdout
    assert "Keeps the tokens of largest norm." in text
    assert "score every token with the L2 norm" in text
    assert "one pass over the features" in text
    assert "keep_ratio" in text


def test_info_shows_presets(tokenreduce) -> None:
    text = tokenreduce("info", "dart").stdout
    assert "official-64" in text
    assert 'site: "decoder", layer: 2, pivots: 4, keep_ratio: 0.111, official: true' in text
    presets = json.loads(tokenreduce("info", "pyramiddrop", "--json").stdout)["presets"]
    assert presets == {
        "official": {"site": "decoder", "schedule": {"8": 0.5, "16": 0.25, "24": 0.125}},
        "any-depth": {"site": "decoder", "schedule": {"0.25": 0.5, "0.5": 0.25, "0.75": 0.125}},
    }


def test_info_as_json(tokenreduce) -> None:
    card = json.loads(tokenreduce("info", "per-segment", "--json").stdout)
    assert card["name"] == "per-segment"
    options = {option["name"]: option for option in card["options"]}
    assert list(options) == ["keep", "keep_ratio", "reduction", "inner", "frames"]
    assert options["frames"]["default"] == "8"
    assert options["inner"] == {
        "name": "inner",
        "type": "Reducer",
        "default": "",
        "help": "the reducer to apply.",
    }


def test_info_suggests(tokenreduce) -> None:
    result = tokenreduce("info", "norm-top")
    assert result.exit_code == 1
    assert "Did you mean 'norm-topk'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", list(installed().strategies))
def test_a_card_agrees_with_the_class(name: str) -> None:
    import dataclasses

    from tokenreduce.api import strategy_class

    strategy = strategy_class(name)
    options = read_card(installed().strategies[name].target).options
    assert [option.name for option in options] == [f.name for f in dataclasses.fields(strategy)]
    for option, f in zip(options, dataclasses.fields(strategy), strict=True):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        assert (option.default == "") == required
        assert option.help, f"{name}: {option.name} is not explained in the docstring"


@pytest.mark.parametrize("target", ["no_such_module:X", "json:NoSuchClass", "sys:X", "a..b:X"])
def test_a_card_without_source_is_empty(target: str) -> None:
    assert read_card(target).options == ()


def test_plugins(tokenreduce) -> None:
    text = tokenreduce("plugins").stdout
    assert "strategy norm-topk" in text
    statuses = json.loads(tokenreduce("plugins", "--json").stdout)
    assert {status["name"] for status in statuses} >= {"signals", "strategies", "transformers"}


def test_check(tokenreduce) -> None:
    result = tokenreduce("check", "norm-topk")
    assert result.exit_code == 0
    assert "checks are in order" in result.stdout
    results = json.loads(tokenreduce("check", "norm-topk", "--json").stdout)
    assert all(result["ok"] for result in results)


def test_check_of_an_unknown_name(tokenreduce) -> None:
    result = tokenreduce("check", "norm-top")
    assert result.exit_code == 1
    assert "Did you mean 'norm-topk'" in result.stderr


def test_check_of_a_strategy_that_breaks_its_contract(tokenreduce) -> None:
    from types import SimpleNamespace

    @hookimpl
    def register_strategies(register) -> None:
        register("whimsical", f"{__name__}:Whimsical", summary="Random.", kind="prune")

    hooks = SimpleNamespace(register_strategies=register_strategies)
    status = installed().load("whim", hooks)
    try:
        result = tokenreduce("check", "whimsical")
        assert result.exit_code == 1
        assert "failed" in result.stdout
        document = tokenreduce("check", "whimsical", "--json")
        assert document.exit_code == 1
        outcomes = {entry["check"]: entry["ok"] for entry in json.loads(document.stdout)}
        assert not all(outcomes.values())
        assert outcomes["shapes"]
    finally:
        installed().statuses.remove(status)
        installed().strategies.remove("whimsical")


@dataclass(frozen=True, kw_only=True)
class Whimsical(Scorer):
    """Keeps other tokens each time."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return torch.rand(tokens.features.shape[:2])


def test_a_pattern_that_fits_nothing_says_so(tokenreduce) -> None:
    result = tokenreduce("list", "nomatch*")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "No installed strategy has a name like 'nomatch*'." in result.stderr
    result = tokenreduce("list", "fastvi*", "--site", "decoder")
    assert "at the site 'decoder'" in result.stderr
    assert "Did you mean 'fastv'?" in result.stderr
    assert json.loads(tokenreduce("list", "nomatch*", "--json").stdout) == []


def test_a_strategy_with_weights_is_checked_with_a_file(tokenreduce) -> None:
    result = tokenreduce("check", "dyvte")
    assert result.exit_code == 1
    assert "tokenreduce check dyvte weights=FILE.safetensors" in result.stderr
    assert "function" not in result.stderr
    result = tokenreduce("check", "norm-topk", "keep")
    assert "is not 'key=value'" in result.stderr

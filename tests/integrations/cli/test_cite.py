import json
from pathlib import Path

import pytest

from tokenreduce.plugins import installed
from tokenreduce_integrations.cli.cite import bibtex

PIPELINE = """
model: {path: "testbed:b"}
reduce:
  - {strategy: per-frame, inner: {strategy: visionzip}, keep: 64}
  - {strategy: framefusion, keep: 32}
  - {strategy: framefusion-prune, site: decoder, layer: 2, keep: 16}
  - {strategy: norm-topk, keep: 8}
"""


def test_a_strategy(tokenreduce) -> None:
    printed = tokenreduce("cite", "visionzip").stdout
    assert printed.startswith("@inproceedings{yang2025visionzip,\n")
    assert printed.endswith("}\n")
    assert printed.count("@") == 1
    assert tokenreduce("cite", "visionzip@official-64").stdout == printed


def test_a_pipeline_with_what_it_wraps(tokenreduce, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PIPELINE)
    result = tokenreduce("cite", path)
    # FrameFusion's two parts come from one paper.
    assert [line for line in result.stdout.splitlines() if line.startswith("@")] == [
        "@inproceedings{yang2025visionzip,",
        "@inproceedings{fu2025framefusion,",
    ]
    assert "norm-topk: nothing to cite" in result.stderr
    document = json.loads(tokenreduce("cite", path, "--json").stdout)
    assert list(document) == [
        "per-frame",
        "visionzip",
        "framefusion",
        "framefusion-prune",
        "norm-topk",
    ]


def test_unknown(tokenreduce) -> None:
    result = tokenreduce("cite", "visionzap")
    assert result.exit_code == 1
    assert "'visionzip'" in result.stderr
    assert "no such pipeline file" in tokenreduce("cite", "none.yaml").stderr


@pytest.mark.parametrize("name", [r.name for r in installed().strategies.values() if r.paper])
def test_every_paper_has_an_entry(name: str) -> None:
    record = installed().strategies[name]
    entry = bibtex(record)
    assert entry.startswith("@")
    assert entry.count("{") == entry.count("}")

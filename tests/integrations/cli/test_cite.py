import json
import re
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
    kind, _, fields = parse(bibtex(record))
    assert fields.keys() >= {"title", "author", "year"}
    assert kind != "article" or "journal" in fields
    assert kind != "inproceedings" or "booktitle" in fields
    assert int(fields["year"]) >= 1990
    # Authors stand as "Family, Given"; nobody is left out as "others".
    assert all(author.count(",") == 1 for author in fields["author"].split(" and "))
    assert record.paper in (fields.get("eprint"), fields.get("journal", "").partition(":")[2])


def test_keys_are_those_of_one_paper() -> None:
    papers: dict[str, str] = {}
    for record in installed().strategies.values():
        if entry := bibtex(record):
            assert papers.setdefault(parse(entry)[1], entry) == entry, record.name


def parse(entry: str) -> tuple[str, str, dict[str, str]]:
    """Kind, key and fields of one BibTeX entry; what is no such entry fails."""
    head = re.fullmatch(r"@(\w+)\{([a-z0-9]+),\n(.*)\n\}", entry, re.DOTALL)
    assert head, entry
    fields = {}
    for field in re.split(r",\n  (?=\w+=\{)", head[3].removeprefix("  ")):
        found = re.fullmatch(r"(\w+)=\{(.*)\}", field, re.DOTALL)
        assert found, field
        depth = 0
        for character in found[2]:
            depth += {"{": 1, "}": -1}.get(character, 0)
            assert depth >= 0, field
        assert depth == 0, field
        assert found[1] not in fields, field
        fields[found[1]] = " ".join(found[2].split())
    return head[1], head[2], fields

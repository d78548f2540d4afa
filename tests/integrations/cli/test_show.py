import json

from PIL import Image


def test_show_a_pipeline(tokenreduce, pipeline, picture, tmp_path) -> None:
    result = tokenreduce("show", pipeline, picture, "reduce.0.reduction=4")
    assert result.exit_code == 0
    assert "144 -> 36 visual tokens" in result.stdout
    with Image.open(tmp_path / "tokenreduce-overlay.png") as drawn:
        assert drawn.size == (384, 384)


def test_show_a_model(tokenreduce, picture, tmp_path) -> None:
    result = tokenreduce(
        "show",
        "testbed:b",
        picture,
        "--strategy",
        "norm-topk",
        "--reduction",
        8,
        "--output",
        tmp_path / "x.png",
        "--json",
    )
    document = json.loads(result.stdout)
    assert document["output"] == str(tmp_path / "x.png")
    assert document["receipt"]["tokens_out"] == 18
    assert (tmp_path / "x.png").exists()


def test_show_says_what_is_wrong(tokenreduce, pipeline, picture, tmp_path) -> None:
    for arguments, message in (
        (("testbed:z", picture), "no testbed model 'z'"),
        ((pipeline, "no.png"), "no.png: no such file"),
        ((pipeline, picture, "--output", tmp_path / "no" / "x.png"), "cannot be written"),
        ((pipeline, picture, "--output", tmp_path / "x.nonsense"), "cannot be written"),
        ((pipeline, picture, "--question", " "), "the question is empty"),
    ):
        result = tokenreduce("show", *arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert message in result.stderr

import json
import os
import shlex
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest

PIPELINE = """
model: {path: "testbed:b"}
reduce:
  - {strategy: norm-topk, reduction: 8}
"""


@pytest.fixture
def pipeline(tmp_path):
    path = tmp_path / "served.yaml"
    path.write_text(PIPELINE)
    return path


def overrides(printed: str) -> dict:
    command = shlex.split(printed)
    return json.loads(command[command.index("--hf-overrides") + 1])


def test_print_is_a_command_for_a_shell(tokenreduce, pipeline) -> None:
    result = tokenreduce("serve", pipeline, "--print")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert overrides(result.stdout)["tokenreduce"] == {"strategy": "norm-topk", "reduction": 8}


def test_overrides_come_before_the_arguments_of_vllm(tokenreduce, pipeline) -> None:
    result = tokenreduce(
        "serve", pipeline, "reduce.0.reduction=4", "--print", "--", "--port", "8001", "--seed=0"
    )
    assert overrides(result.stdout)["tokenreduce"]["reduction"] == 4
    assert shlex.split(result.stdout)[-3:] == ["--port", "8001", "--seed=0"]


def test_options(tokenreduce, pipeline) -> None:
    arguments = ("serve", pipeline, "reduce.0.strategy=mmtok", "--print")
    assert "--query" in tokenreduce(*arguments).stderr
    assert "--trust-request-mm-kwargs" in tokenreduce(*arguments, "--trust-requests").stdout
    asked = tokenreduce(*arguments, "--query", "what's there ?").stdout
    assert overrides(asked)["tokenreduce"]["query"] == "what's there ?"


def test_what_cannot_be_served_is_shown_part_by_part(tokenreduce, tmp_path) -> None:
    (tmp_path / "deep.yaml").write_text(
        "model: {path: 'testbed:b', device: cpu}\n"
        "reduce:\n"
        "- {strategy: divprune, keep: 9}\n"
        "- {strategy: fastv, site: decoder, layer: 2, keep: 4}\n"
    )
    result = tokenreduce("serve", "deep.yaml", "--print")
    assert result.exit_code == 1
    for shown in ("model.device", "divprune at projector", "fastv at decoder", "one sequence"):
        assert shown in result.stdout
    assert "deep.yaml: vLLM cannot serve 2 of its 5 parts." in result.stderr


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_way_to_install_it_is_told(tokenreduce, pipeline) -> None:
    result = tokenreduce("serve", pipeline)
    assert result.exit_code == 1
    assert "pip install" in result.stderr


def stand_in(tmp_path, script: str, version: str = "0.32.1") -> dict[str, str]:
    """An environment with a program of the name and release of vLLM."""
    record = tmp_path / "site" / f"vllm-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(record.parent), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(program.parent), os.environ["PATH"]]),
    }


def start(pipeline, environment: dict[str, str], *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tokenreduce_integrations.cli", "serve", str(pipeline), *extra]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_server_takes_the_place_of_the_command(pipeline, tmp_path) -> None:
    """Its signals, its output and its exit status are those of the command."""
    environment = stand_in(
        tmp_path,
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(7))\n"
        "print(os.getpid(), *sys.argv[1:3], flush=True)\n"
        "signal.pause()\n",
    )
    server = start(pipeline, environment, "--", "--port", "8001")
    assert server.stdout is not None
    pid, *arguments = server.stdout.readline().split()
    assert int(pid) == server.pid
    assert arguments[0] == "serve"
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=60)
    assert server.returncode == 7
    assert errors.splitlines()[-1].endswith("--port 8001")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize(
    ("version", "plugins", "message"),
    [
        ("0.31.0", None, "vllm 0.31.0 is installed; TokenReduce serves with vLLM >=0.32,<0.34"),
        ("0.32.0", "other", "VLLM_PLUGINS='other' keeps vLLM from loading TokenReduce"),
    ],
)
def test_a_vllm_that_would_not_reduce_is_not_started(
    pipeline, tmp_path, version, plugins, message
) -> None:
    environment = stand_in(tmp_path, "raise SystemExit('was started')", version)
    if plugins:
        environment["VLLM_PLUGINS"] = plugins
    server = start(pipeline, environment)
    _, errors = server.communicate(timeout=60)
    assert server.returncode == 1
    assert message in errors


@pytest.mark.vllm
def test_vllm_reads_the_arguments(pipeline) -> None:
    environment = {**os.environ}
    wrong = start(pipeline, environment, "--", "--no-such-argument")
    _, errors = wrong.communicate(timeout=300)
    assert wrong.returncode == 2
    assert "--no-such-argument" in errors
    right = start(pipeline, environment, "--trust-requests", "--", "--help")
    shown, _ = right.communicate(timeout=300)
    assert right.returncode == 0
    assert shown

"""A vLLM server on loopback, asked over the API of OpenAI."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

PATIENCE = 300
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: its address.
        process: the one that was started; the engine is a child of it.
        log: what it said.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def resident(self) -> int:
        """Bytes of memory that its processes hold."""
        return sum(process.memory_info().rss for process in self._processes())

    @property
    def processor_seconds(self) -> float:
        """Time that its processes have spent on processors."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(each.user + each.system for each in times)

    def _processes(self) -> list[psutil.Process]:
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def metric(self, name: str) -> float:
        """A gauge or counter that the server publishes, over all its labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    def healthy(self) -> bool:
        """Whether it serves."""
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, body: Mapping[str, Any]) -> httpx.Response:
        """Post one chat request."""
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=PATIENCE)

    def ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Post requests at once; their answers, in order."""

        async def post() -> list[dict[str, Any]]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=self.url, timeout=PATIENCE, limits=limits
            ) as client:
                responses = await asyncio.gather(
                    *(client.post("/v1/chat/completions", json=body) for body in bodies)
                )
            return [response.raise_for_status().json() for response in responses]

        return asyncio.run(post())

    def leave_early(self, body: Mapping[str, Any]) -> None:
        """Post a request, read the beginning of its answer, and hang up."""
        with httpx.stream(
            "POST",
            f"{self.url}/v1/chat/completions",
            json={**body, "stream": True},
            timeout=PATIENCE,
        ) as response:
            response.raise_for_status()
            next(response.iter_raw())


@contextmanager
def server(
    folder: Path, log: Path, *arguments: str, overrides: Mapping[str, Any] | None = None
) -> Iterator[Server]:
    """A server of a checkpoint, gone afterwards.

    Args:
        folder: of the checkpoint.
        log: a file for what the server says.
        arguments: further ones of vLLM.
        overrides: of the model's configuration.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details"]
    if overrides is not None:
        command += ["--hf-overrides", json.dumps(overrides)]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ},
        )
        running = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            end = time.monotonic() + PATIENCE
            while not running.healthy():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"no server came up:\n{log.read_text()[-4000:]}")
                time.sleep(0.5)
            yield running
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _encoded(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    picture.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def image_part(picture: Image.Image) -> dict[str, Any]:
    """A picture as part of a message."""
    url = f"data:image/png;base64,{_encoded(picture, 'PNG')}"
    return {"type": "image_url", "image_url": {"url": url}}


def video_part(frames: np.ndarray) -> dict[str, Any]:
    """A clip ``(T, height, width, 3)`` as part of a message."""
    pictures = ",".join(_encoded(Image.fromarray(frame), "JPEG") for frame in frames)
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{pictures}"}}


def chat(question: str, part: Mapping[str, Any], tokens: int = 6, **more: Any) -> dict[str, Any]:
    """A greedy request about a picture or clip.

    Args:
        question: what is asked.
        part: the picture or clip.
        tokens: how many are generated.
        more: further fields of the request.
    """
    content = [part, {"type": "text", "text": question}]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }

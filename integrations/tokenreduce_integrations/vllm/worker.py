"""vLLM's worker for CPUs, whose runner asks the model where visual tokens stand."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker


class CPUWorker(cpu_worker.CPUWorker):  # type: ignore[misc]
    """Enables on its own runner what vLLM's runner for CPUs leaves out when it loads a model."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM."""
        super().load_model(*args, **kwargs)
        self.model_runner.is_multimodal_pruning_enabled = True

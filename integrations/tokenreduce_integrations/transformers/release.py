"""The releases of transformers that TokenReduce runs on."""

from __future__ import annotations

from typing import Final

from packaging.version import Version

from tokenreduce.errors import UnsupportedRelease

OLDEST: Final = "5.22"
"""Earlier ones merge visual features or number positions in other ways."""
NEXT_MAJOR: Final = "6"


def require_supported_release() -> None:
    """Refuse a transformers whose models are built otherwise, rather than reduce them wrongly.

    Raises:
        UnsupportedRelease: naming the installed release.
    """
    import transformers

    installed = Version(transformers.__version__)
    # The development version of a release counts as that release.
    if not Version(OLDEST) <= Version(installed.base_version) < Version(NEXT_MAJOR):
        raise UnsupportedRelease(
            f"transformers {installed} is installed; TokenReduce attaches to models of "
            f"transformers >={OLDEST},<{NEXT_MAJOR}. "
            f"pip install 'transformers>={OLDEST},<{NEXT_MAJOR}'"
        )

"""Every exception that TokenReduce raises on purpose.

Each message says what failed, where, why, and what to do about it. All of them derive from
:class:`TokenReduceError`; those that a caller may also expect as a built-in kind of error derive
from that too (an unknown name is a ``LookupError``, a bad value a ``ValueError``).
"""

import difflib
from collections.abc import Iterable


class TokenReduceError(Exception):
    """Base class of all errors raised by TokenReduce."""


class BudgetError(TokenReduceError, ValueError):
    """A token budget is missing, contradictory or impossible."""


class TokensError(TokenReduceError, ValueError):
    """Visual tokens are malformed: shapes, coordinates or values."""


class ReductionError(TokenReduceError, ValueError):
    """A strategy returned a result that breaks its contract."""


class PositionsError(ReductionError):
    """A strategy kept a token twice, left a group empty, or named a token that is not there."""


class MissingSignal(TokenReduceError, LookupError):
    """A strategy needs a signal that its tokens, or this model, cannot give."""


class UnknownName(TokenReduceError, LookupError):
    """A name that no installed plugin registered."""


class RegistrationError(TokenReduceError, ValueError):
    """A plugin registered something invalid or a name that is taken."""


class PluginError(TokenReduceError, RuntimeError):
    """A plugin failed to load (raised in strict mode only; otherwise recorded)."""


class ProjectError(TokenReduceError, ValueError):
    """A plugin package cannot be written: its name or its folder."""


class MissingExtra(TokenReduceError, ImportError):
    """An optional dependency is not installed."""


class UnsupportedRelease(TokenReduceError, ImportError):
    """A library is installed in a release that TokenReduce does not run on."""


class PipelineError(TokenReduceError, ValueError):
    """A pipeline file or object is invalid."""


class UnsupportedModel(TokenReduceError, TypeError):
    """A model that cannot be reduced, with the reason."""


class UnsupportedSite(TokenReduceError, ValueError):
    """A stage at a site that the strategy or the model cannot serve."""


class UnsupportedGeneration(TokenReduceError, ValueError):
    """A way of generating that cannot go with a shorter sequence."""


class AttachmentError(TokenReduceError, RuntimeError):
    """An attachment is in the wrong state: attached twice, detached, or tampered with."""


class StageNotEngaged(TokenReduceError, RuntimeError):
    """Visual tokens went through the model, but a stage never saw them."""


class UncountedOperator(TokenReduceError, NotImplementedError):
    """An operator that does work, and whose FLOPs nobody knows how to count."""


class MediaError(TokenReduceError, ValueError):
    """An image, clip or prompt given by the user cannot be used."""


class ServingError(TokenReduceError, ValueError):
    """A stage, a pipeline or a request that an inference engine cannot serve, with the reason."""


class EvaluationError(TokenReduceError, ValueError):
    """Data, results or settings of an evaluation that cannot be used, or do not belong together."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest known names.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        ``"Did you mean 'x'?"`` where something is near, else the list of known names.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(match) for match in near)}?"
    return f"Known: {', '.join(choices) if choices else 'none'}."

"""The vocabulary of signals: what a strategy may read of a model beside the projected features.

A plugin extends the vocabulary through the hook ``register_signals``; the built-in names below
enter by the same hook.
"""

from dataclasses import dataclass

from tokenreduce.errors import RegistrationError
from tokenreduce.hookspecs import Register, hookimpl


@dataclass(frozen=True, kw_only=True)
class SignalRecord:
    """One signal.

    Attributes:
        name: the registered name, the key in ``VisualTokens.signals``.
        dims: names of the axes; a signal whose second axis is ``"tokens"`` has one value (or
            vector) for each token that the LLM sees and is reduced with the tokens.
        meaning: one line.
        distribution: the distribution that registered it; filled in by the loader.
    """

    name: str
    dims: tuple[str, ...]
    meaning: str
    target: str = "tokenreduce.signals:SignalRecord"
    extra: str = ""
    distribution: str = ""

    def __post_init__(self) -> None:
        if not self.dims or self.dims[0] != "batch":
            raise RegistrationError(
                f"signal {self.name!r}: dims {self.dims!r} must begin with 'batch'."
            )

    @property
    def per_token(self) -> bool:
        """Whether the signal has one entry for each visual token."""
        return len(self.dims) > 1 and self.dims[1] == "tokens"


@hookimpl
def register_signals(register: Register) -> None:
    """The built-in vocabulary."""
    for name, dims, meaning in (
        (
            "vision_features",
            ("batch", "tokens", "channels"),
            "features of the vision encoder before the projector",
        ),
        (
            "class_attention",
            ("batch", "tokens"),
            "attention of the class token to each token, averaged over heads",
        ),
        (
            "shallow_class_attention",
            ("batch", "tokens"),
            "class attention of an early encoder layer",
        ),
        (
            "received_attention",
            ("batch", "tokens"),
            "attention that each token receives from all others, averaged over heads",
        ),
        ("queries", ("batch", "tokens", "channels"), "attention queries of an encoder layer"),
        ("keys", ("batch", "tokens", "channels"), "attention keys of an encoder layer"),
        (
            "prompt_embeddings",
            ("batch", "prompt", "channels"),
            "text embeddings of the prompt, in the space of the LLM",
        ),
        (
            "joint_image_embeddings",
            ("batch", "tokens", "channels"),
            "patch embeddings in the space that a vision-text encoder shares with text",
        ),
        (
            "joint_text_embeddings",
            ("batch", "prompt", "channels"),
            "prompt embeddings in the space that a vision-text encoder shares with images",
        ),
        (
            "last_token_attention",
            ("batch", "tokens"),
            "attention of the prompt's last token to each token, in the LLM layer before the cut",
        ),
        (
            "prompt_attention",
            ("batch", "tokens", "prompt"),
            "attention of each text token after the item to each token, in that layer",
        ),
        (
            "unrotated_attention",
            ("batch", "tokens"),
            "attention of the last token without rotary positions, in that layer",
        ),
        (
            "decoder_received_attention",
            ("batch", "tokens"),
            "mean attention that each token receives from the whole sequence, in that layer",
        ),
        (
            "attention_page_rank",
            ("batch", "tokens"),
            "how often walks along the attention of the whole sequence come by each token, in that "
            "layer; takes a matrix of the sequence for each head",
        ),
        (
            "decoder_keys",
            ("batch", "tokens", "channels"),
            "attention keys of each token, heads end to end, in that layer",
        ),
        (
            "prompt_keys",
            ("batch", "prompt", "channels"),
            "attention keys of each text token after the item, in that layer",
        ),
        (
            "prompt_states",
            ("batch", "prompt", "channels"),
            "hidden states of each text token after the item, at the cut",
        ),
        (
            "former_scores",
            ("batch", "tokens"),
            "what the same strategy scored the tokens that a stream holds, NaN for new ones; no "
            "strategy needs it",
        ),
        (
            "seen_direction",
            ("batch", "channels"),
            "mean direction of all tokens that were fed to a stream; no strategy needs it",
        ),
        (
            "former_groups",
            ("batch", "tokens"),
            "numbers of what the tokens that a stream holds were merged into, equal for those that "
            "belong together; no strategy needs it",
        ),
    ):
        register(name, dims=dims, meaning=meaning)

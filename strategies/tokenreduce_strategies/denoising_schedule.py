"""Lets the first denoising steps of a diffusion model see all tokens, and the others fewer.

Idea: a multimodal LLM that answers by denoising reads the image again at every step. The first
steps settle what the answer is about; once it has taken shape, a few visual tokens do.

Algorithm, for a block of the answer that is denoised in steps 0, 1, 2, ...:
    1. steps 0 to ``from_step`` - 1 read the prompt with all its visual tokens;
    2. the others read the prompt with the tokens that the inner strategy leaves;
    3. each further block begins again at step 0, after both prompts have read the block before.

The steps belong to the model: a reducer that is called on tensors sees none, and this one then
reduces as its inner strategy does. Attached to a diffusion model, both prompts are encoded, and
both are held in memory: time is saved in the late steps, memory is not, and the receipt says both.
A model that does not denoise refuses the strategy.

Shapes: those of the inner strategy. Cost: that of the inner strategy, and once more the encoding of
the reduced prompt.

There is no official code. In the study below the schedule is a share of the steps; here it is a
number of steps, since a model that stops when its answer is stable does not know their number
beforehand. 24 is half of the steps that DiffusionGemma takes at most.

Published: DivPrune with a quarter of the tokens from the middle step on, LLaDA-V, long answers:
1.44 times as fast, InfoVQA 66.2 -> 65.0, DocVQA 83.9 -> 83.1. The study finds nothing to gain on
short answers (its tables).

```bibtex
@article{li2025redundancy,
  title={A Comprehensive Study on Visual Token Redundancy for Discrete Diffusion-based Multimodal
         Large Language Models},
  author={Li, Duo and Yang, Zuhao and Zhang, Xiaoqin and Shao, Ling and Lu, Shijian},
  journal={arXiv preprint arXiv:2511.15098},
  year={2025}
}
```
"""

from dataclasses import dataclass

from tokenreduce.errors import PipelineError
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce.wrappers import Wrapper


@dataclass(frozen=True, kw_only=True)
class DenoisingSchedule(Wrapper):
    """Applies a strategy from a denoising step on.

    Args:
        from_step: how many steps of each block of the answer see all tokens, at least 1.

    Raises:
        PipelineError: if ``from_step`` is out of range.
    """

    from_step: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.from_step) is not int or self.from_step < 1:
            raise PipelineError(
                f"{self.name}: from_step={self.from_step!r} must be a whole number, at least 1. To "
                f"reduce at every step, use {self.inner.name} alone."
            )

    def reduce(self, tokens: VisualTokens) -> Reduction:
        if self.budget is None:
            return self.inner(tokens)
        return self.inner.with_budget(keep=self.count(tokens.count))(tokens)

"""How families of models take the frames of a clip, as data: what the encoder is given and gives,
and how a clip is described to the model's own processor, which writes the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor

from tokenreduce.errors import MediaError, UnsupportedModel

Modality = Literal["image", "video"]
#: (height, width) in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class Chunk:
    """Some frames of a clip, encoded.

    Attributes:
        features: ``(T * H * W, D * layers)`` what the LLM reads of each token: its embedding, and
            beside it what DeepStack adds in the LLM's first layers.
        grid: (T, H, W) in tokens.
        layers: 1, and one more for each layer of DeepStack.
        end: ``(E, D * layers)`` tokens that stand at the end of a clip and belong to no frame.
        output: the class of the encoder's output.
        frame: the shape of a frame that was encoded; empty where patches have lost it.
    """

    features: Tensor
    grid: tuple[int, int, int]
    layers: int
    end: Tensor
    output: type[Any]
    frame: tuple[int, ...] = ()

    @property
    def channels(self) -> int:
        """D."""
        return self.features.shape[1] // self.layers


class ClipForm(Protocol):
    """What differs between families."""

    @property
    def modality(self) -> Modality:
        """What the model takes the features for."""
        ...

    @property
    def token(self) -> Modality:
        """Whose token stands for the clip in the prompt."""
        ...

    @property
    def separated(self) -> bool:
        """Whether text stands between moments: timestamps, or numbers of frames."""
        ...

    def moment(self, video: Any) -> int:
        """Frames that become one frame of tokens, as the video processor says."""
        ...

    def size(self, video: Any, frames: int, shape: Sequence[int]) -> Size | None:
        """How large the video processor makes the frames of a clip; None if always alike.

        Args:
            video: the video processor.
            frames: pictures of the clip.
            shape: (height, width, 3) of each.
        """
        ...

    def process(self, video: Any, pictures: Tensor, size: Size | None) -> Mapping[str, Any]:
        """The encoder's inputs for some of the pictures ``(n, height, width, 3)`` of a clip."""
        ...

    def encode(self, model: Any, inputs: Mapping[str, Any]) -> Chunk:
        """Run the encoder."""
        ...

    def stand_in(self, video: Any, frame: Sequence[int], moments: int) -> dict[str, Any]:
        """A processed clip without its pixels, for a processor to count tokens by.

        Args:
            video: the video processor.
            frame: of a chunk of the clip.
            moments: its length, in frames of tokens.
        """
        ...

    def restore(self, chunk: Chunk, features: Tensor) -> Any:
        """What the encoder would have put out, had it given these features ``(K, D * layers)``."""
        ...


@dataclass(frozen=True)
class PatchedFrames:
    """Frames of native resolution, as flat patches with ``video_grid_thw`` beside them (Qwen-VL).

    How large the processor makes them depends on the length of the clip.

    Args:
        separated: whether a timestamp stands before or after each moment.
        token: ``image`` where tokens of a clip are written as those of images.
    """

    separated: bool = False
    token: Modality = "video"
    modality: Modality = "video"

    def moment(self, video: Any) -> int:
        return int(video.temporal_patch_size)

    def size(self, video: Any, frames: int, shape: Sequence[int]) -> Size | None:
        # A clip that takes no memory tells.
        length = max(frames, self.moment(video))
        clip = torch.empty(length, *shape, dtype=torch.uint8, device="meta")
        _, rows, columns = _processed(video, clip)["video_grid_thw"][0].tolist()
        return rows * video.patch_size, columns * video.patch_size

    def process(self, video: Any, pictures: Tensor, size: Size | None) -> Mapping[str, Any]:
        from transformers.image_utils import SizeDict
        from transformers.video_processing_utils import BaseVideoProcessor

        if size is None:
            return _processed(video, pictures)
        resize: Any = BaseVideoProcessor.resize
        clip = pictures.permute(0, 3, 1, 2)[None]
        wanted = SizeDict(height=size[0], width=size[1])
        [scaled] = resize(video, clip, size=wanted, resample=video.resample)
        return _processed(video, scaled, do_resize=False)

    def encode(self, model: Any, inputs: Mapping[str, Any]) -> Chunk:
        grid = inputs["video_grid_thw"]
        output = model.model.get_video_features(
            inputs["pixel_values_videos"].to(model.device), grid.to(model.device), return_dict=True
        )
        [features] = output.pooler_output
        deeper = [layer for [layer] in getattr(output, "deepstack_features", None) or ()]
        merge = model.config.vision_config.spatial_merge_size
        [(t, h, w)] = grid.tolist()
        features = torch.cat([features, *deeper], dim=1)
        sides = (h // merge, w // merge)
        return Chunk(features, (t, *sides), 1 + len(deeper), features[:0], type(output))

    def stand_in(self, video: Any, frame: Sequence[int], moments: int) -> dict[str, Any]:
        return {"video_grid_thw": torch.tensor([[moments, video.merge_size, video.merge_size]])}

    def restore(self, chunk: Chunk, features: Tensor) -> Any:
        first, *deeper = features.chunk(chunk.layers, dim=1)
        further = {"deepstack_features": [(layer,) for layer in deeper]} if deeper else {}
        return chunk.output(pooler_output=(first,), **further)


@dataclass(frozen=True)
class StackedFrames:
    """Frames of one size, each a fixed number of tokens.

    Args:
        modality: ``image`` where the model takes frames for as many images.
        separated: whether the number of each frame stands before it.
        end: tokens that the model appends to a clip.
    """

    modality: Modality = "video"
    separated: bool = False
    end: int = 0

    @property
    def token(self) -> Modality:
        return self.modality

    def moment(self, video: Any) -> int:
        return 1

    def size(self, video: Any, frames: int, shape: Sequence[int]) -> Size | None:
        return None

    def process(self, video: Any, pictures: Tensor, size: Size | None) -> Mapping[str, Any]:
        return _processed(video, pictures)

    def encode(self, model: Any, inputs: Mapping[str, Any]) -> Chunk:
        clip = inputs["pixel_values_videos"].to(model.device)
        if self.modality == "image":
            output = model.model.get_image_features(clip[0], return_dict=True)
        else:
            output = model.model.get_video_features(clip, return_dict=True)
        rows = output.pooler_output.flatten(0, -2)
        count, frames = len(rows) - self.end, clip.shape[1]
        per_frame = count // frames
        side = math.isqrt(per_frame)
        sides = (side, side) if side**2 == per_frame else (1, per_frame)
        frame = tuple(clip.shape[2:])
        return Chunk(rows[:count], (frames, *sides), 1, rows[count:], type(output), frame)

    def stand_in(self, video: Any, frame: Sequence[int], moments: int) -> dict[str, Any]:
        return {"pixel_values_videos": torch.zeros(1).expand(1, moments, *frame)}

    def restore(self, chunk: Chunk, features: Tensor) -> Any:
        return chunk.output(pooler_output=torch.cat([features, chunk.end])[None])


def _processed(video: Any, clip: Tensor, **settings: Any) -> Mapping[str, Any]:
    """Frames as the model's own video processor prepares them.

    Raises:
        MediaError: if it cannot.
    """
    try:
        done: Mapping[str, Any] = video(
            videos=[clip], do_sample_frames=False, return_tensors="pt", **settings
        )
    except ValueError as error:
        raise MediaError(
            f"{type(video).__name__} cannot take {len(clip)} frames of {tuple(clip.shape[1:])}: "
            f"{error}"
        ) from error
    return done


_TIMED = PatchedFrames(separated=True)
_GLM = PatchedFrames(separated=True, token="image")
#: Families whose clips can be encoded a few frames at a time, by ``config.model_type``.
FORMS: Final[Mapping[str, ClipForm]] = {
    "qwen2_vl": PatchedFrames(),
    "qwen2_5_vl": PatchedFrames(),
    "qwen3_vl": _TIMED,
    "qwen3_vl_moe": _TIMED,
    "qwen3_5": _TIMED,
    "qwen3_5_moe": _TIMED,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "llava_onevision": StackedFrames(end=1),
    "llava_next_video": StackedFrames(),
    "internvl": StackedFrames(modality="image", separated=True),
}
#: Why others cannot, where that is more than a form that nobody has written.
REASONS: Final[Mapping[str, str]] = {
    "video_llama_3": "its processor leaves out patches that repeat what the frame before showed, "
    "so tokens have no grid",
    "instructblipvideo": "it takes four frames of a clip, whatever its length",
    "video_llava": "it was trained on eight frames of a clip, whatever its length",
}


def form_of(model: Any, processor: Any) -> ClipForm:
    """How a model takes clips.

    Raises:
        UnsupportedModel: if its clips cannot be encoded a few frames at a time.
    """
    kind = getattr(model.config, "model_type", "")
    if kind in FORMS and getattr(processor, "video_processor", None) is not None:
        return FORMS[kind]
    reason = REASONS.get(kind, "how it takes clips is not known")
    raise UnsupportedModel(
        f"{type(model).__name__} ({kind}): {reason}. Video files are read by models of the types "
        f"{', '.join(FORMS)}. Give a folder of frames: mkdir frames && ffmpeg -i clip.mp4 -vf "
        "fps=1 frames/%04d.png"
    )

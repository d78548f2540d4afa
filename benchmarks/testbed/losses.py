"""Training heads and losses. None of them is part of the exported model."""

import torch
import torch.nn.functional as F
from data import IGNORED, QUERIES, TAGS, Batch
from torch import Tensor, nn

from tokenreduce_integrations.testbed.scenes import GRID_SIZE, IMAGE_SIZE, PATCH_LABELS, PATCH_SIZE
from tokenreduce_integrations.testbed.vocabulary import BACKGROUNDS, COLORS, SHAPES

_CELL = PATCH_SIZE // 2
_NEIGHBOURHOOD = 3 * 2 * 3 * 2 * 3


class AuxiliaryHeads(nn.Module):
    """Heads on the vision tower's patch features ``(B, 144, D)`` and class token ``(B, D)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, PATCH_LABELS)
        self.position = nn.Linear(width, 2 * GRID_SIZE)
        self.pixels = nn.Linear(width, _NEIGHBOURHOOD)
        self.tags = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, TAGS))
        self.queries = QueryDecoder(width)
        self.grounding = nn.Linear(width, 2)

    def losses(
        self, patches: Tensor, pooled: Tensor, batch: Batch, active: set[str]
    ) -> dict[str, Tensor]:
        """Compute the losses named in `active`."""
        found: dict[str, Tensor] = {}
        if "patch" in active:
            weight = torch.ones(PATCH_LABELS)
            weight[0] = 0.3
            logits = self.patch(patches).float().flatten(0, 1)
            found["patch"] = F.cross_entropy(logits, batch.patch_labels.flatten(), weight=weight)
        if "tags" in active:
            logits = self.tags(pooled).float()
            found["tags"] = 5 * F.binary_cross_entropy_with_logits(logits, batch.tags)
        if "position" in active:
            found["position"] = position_loss(self.position(patches).float())
        if "pixels" in active:
            target = neighbourhood_pixels(batch.images)
            found["pixels"] = F.smooth_l1_loss(self.pixels(patches).float(), target, beta=0.1)
        if "queries" in active:
            found["queries"] = self.queries.loss(patches, batch)
        return found

    def grounding_loss(self, states: Tensor, batch: Batch) -> Tensor:
        """Distance between the centre of each named object and the centre read from its word.

        Args:
            states: Hidden states of the questions, ``(B, Q, L, D)``.
            batch: The batch; only words that name exactly one object count.
        """
        located = ~batch.word_centres.isnan().any(-1)
        centres = self.grounding(states[located]).float()
        return F.smooth_l1_loss(centres, batch.word_centres[located], beta=0.1)

    def accuracies(
        self, patches: Tensor, pooled: Tensor, batch: Batch, active: set[str]
    ) -> dict[str, float]:
        """Accuracy of the heads whose losses are in `active`."""
        found: dict[str, Tensor] = {}
        if "patch" in active:
            right = self.patch(patches).argmax(-1) == batch.patch_labels
            found["patch_background"] = right[batch.patch_labels == 0].float().mean()
            found["patch_object"] = right[batch.patch_labels > 0].float().mean()
            found["patch_digit"] = right[batch.patch_labels >= PATCH_LABELS - 10].float().mean()
        if "tags" in active:
            given, true = self.tags(pooled) > 0, batch.tags > 0
            found["tag_recall"] = (given & true).sum() / true.sum()
            found["tag_precision"] = (given & true).sum() / given.sum().clamp(min=1)
        if "queries" in active:
            count, centre, shape, color, digit = self.queries(patches).split(self.queries.sizes, -1)
            right = count.argmax(-1) == batch.query_counts
            found["query_count"] = right[batch.query_counts > 0].float().mean()
            found["query_none"] = right[batch.query_counts == 0].float().mean()
            error = (centre - batch.query_centres).abs() * IMAGE_SIZE / 2
            found["query_centre_pixels"] = error.nanmean()
            for name, logits, target in zip(
                ("shape", "color", "digit"),
                (shape, color, digit),
                batch.query_kinds.unbind(-1),
                strict=True,
            ):
                known = target != IGNORED
                found[f"query_{name}"] = (logits.argmax(-1) == target)[known].float().mean()
        return {name: round(value.item(), 3) for name, value in found.items()}


class QueryDecoder(nn.Module):
    """Answers fixed caption queries ("the red things", "the circles") by attending to patches.

    The supervision is about objects, never about patches: how many objects match the query and, if
    there is exactly one, where its centre is and which shape, colour or digit it has. It plays the
    part that matching captions plays for CLIP.
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.shape = nn.Parameter(torch.randn(len(SHAPES), width) * 0.5)
        self.color = nn.Parameter(torch.randn(len(COLORS), width) * 0.5)
        self.any_shape = nn.Parameter(torch.randn(1, width) * 0.5)
        self.any_color = nn.Parameter(torch.randn(1, width) * 0.5)
        self.digit = nn.Parameter(torch.randn(1, width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.merge = nn.Linear(width, width)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.sizes = [5, 2, len(SHAPES), len(COLORS), 10]
        self.head = nn.Linear(width, sum(self.sizes))
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def embeddings(self) -> Tensor:
        """The queries, ``(QUERIES, width)``, in the order of `data.scene_queries`."""
        pairs = (self.shape[:, None] + self.color[None]).flatten(0, 1)
        shapes, colors = self.shape + self.any_color, self.color + self.any_shape
        return torch.cat([pairs, shapes, colors, self.digit])

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches ``(B, 144, width)`` to the logits of every query, ``(B, QUERIES, 29)``."""
        batch, length, width = patches.shape
        size = width // self.heads
        normed = self.norm(patches)
        embeddings = self.embeddings()
        query = self.query(embeddings).view(QUERIES, self.heads, size).transpose(0, 1)
        key = self.key(normed).view(batch, length, self.heads, size).permute(0, 2, 3, 1)
        value = self.value(normed).view(batch, length, self.heads, size).transpose(1, 2)
        weights = (query.to(key.dtype) @ key * size**-0.5).softmax(-1)
        seen = self.merge((weights @ value).transpose(1, 2).reshape(batch, QUERIES, width))
        seen = seen + embeddings
        return self.head(seen + self.mix(seen))

    def loss(self, patches: Tensor, batch: Batch) -> Tensor:
        """Loss of every fact that the queries ask for."""
        count, centre, *kinds = self(patches).float().split(self.sizes, -1)
        present = batch.query_counts > 0
        weight = torch.where(present, 1.0, 0.15)
        entropy = F.cross_entropy(
            count.flatten(0, 1), batch.query_counts.flatten(), reduction="none"
        )
        total = (entropy * weight.flatten()).sum() / weight.sum()
        located = ~batch.query_centres.isnan()
        total = total + 2 * F.smooth_l1_loss(
            centre[located], batch.query_centres[located], beta=0.1
        )
        for logits, target in zip(kinds, batch.query_kinds.unbind(-1), strict=True):
            total = total + 0.5 * F.cross_entropy(
                logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED
            )
        background = self.background(patches.mean(1)).float()
        return total + 0.5 * F.cross_entropy(background, batch.backgrounds)


def position_loss(logits: Tensor) -> Tensor:
    """Cross entropy of each patch's row and column, from logits ``(B, 144, 24)``."""
    index = torch.arange(GRID_SIZE**2).expand(len(logits), -1).flatten()
    rows, columns = logits.flatten(0, 1).split(GRID_SIZE, -1)
    return F.cross_entropy(rows, index // GRID_SIZE) + F.cross_entropy(columns, index % GRID_SIZE)


def neighbourhood_pixels(images: Tensor) -> Tensor:
    """Mean colours of the 4-pixel cells of each patch and its eight neighbours.

    Args:
        images: uint8 ``(B, 96, 96, 3)``.

    Returns:
        Normalised colours, float32 ``(B, 144, 108)``; outside of the image they are zero.
    """
    cells = F.avg_pool2d(normalise(images), _CELL)
    return F.unfold(cells, kernel_size=6, stride=2, padding=2).transpose(1, 2)


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 images ``(B, H, W, 3)`` into the vision tower's input ``(B, 3, H, W)``."""
    return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25

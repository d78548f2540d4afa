"""What a reducer sees: a dense batch of visual items of one layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache
from numbers import Integral
from types import MappingProxyType

import torch
from torch import Tensor

from tokenreduce.errors import MissingSignal, TokensError
from tokenreduce.plugins import installed
from tokenreduce.regions import as_region


class Layout:
    """Where the tokens of a visual item lie in what the user supplied, and which must survive.

    Args:
        coords: ``(N, 4)`` integers: (block, t, y, x) of each token, in units of tokens. A block is
            a tile or crop; it is 0 for a plain image or clip.
        protected: ``(N,)`` booleans, tokens that no reducer may drop or merge (class tokens,
            newlines, timestamps, regions that the user marked); none if omitted.
        extents: (rows, columns) in tokens of each block that shows the whole picture. A block that
            is not named shows an unknown part of it, or has no geometry.

    Raises:
        TokensError: if a shape or a type is wrong.
    """

    def __init__(
        self,
        coords: Tensor,
        protected: Tensor | None = None,
        *,
        extents: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        _require_tensors(coords=coords, protected=protected)
        self.extents = MappingProxyType(dict(extents or {}))
        if coords.ndim != 2 or coords.shape[1] != 4:
            raise TokensError(
                f"coords must have shape (N, 4) with (block, t, y, x) of each token, "
                f"got {tuple(coords.shape)}."
            )
        if coords.is_floating_point() or coords.dtype == torch.bool:
            raise TokensError(f"coords must be integers, got {coords.dtype}.")
        if bool((coords < 0).any()):
            raise TokensError("coords must not be negative: they count blocks, frames and tokens.")
        self.coords = coords.detach().to("cpu", torch.long).contiguous()
        n = self.coords.shape[0]
        if protected is None:
            protected = torch.zeros(n, dtype=torch.bool)
        if protected.shape != (n,) or protected.dtype != torch.bool:
            raise TokensError(
                f"protected must hold {n} booleans, one for each token, got shape "
                f"{tuple(protected.shape)} and type {protected.dtype}."
            )
        self.protected = protected.detach().cpu().contiguous()

    @classmethod
    def from_grid(cls, grid: Sequence[int], *, block: int = 0) -> Layout:
        """The layout of a full grid in raster order.

        Args:
            grid: (T, H, W) or (H, W), in tokens.
            block: the tile or crop it belongs to.
        """
        sides = list(grid) if isinstance(grid, Iterable) else []
        if len(sides) not in (2, 3) or not all(isinstance(n, Integral) and n > 0 for n in sides):
            raise TokensError(
                f"a grid is (T, H, W) or (H, W) in whole, positive tokens, got {grid!r}."
            )
        t, h, w = (1, *grid) if len(grid) == 2 else grid
        return _full_grid(int(t), int(h), int(w), block)

    @classmethod
    def line(cls, length: int) -> Layout:
        """Tokens without geometry, such as a Q-Former's: one row, counted along x."""
        return _line(length)

    def __len__(self) -> int:
        return self.coords.shape[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def key(self) -> tuple[int, bytes, bytes]:
        """Equal for equal layouts; what items are bucketed by."""
        return (
            len(self),
            self.coords.numpy().tobytes(),
            self.protected.numpy().tobytes(),
        )

    @cached_property
    def protected_count(self) -> int:
        """Number of protected tokens."""
        return int(self.protected.sum())

    @cached_property
    def free(self) -> Tensor:
        """``(F,)`` indices of the unprotected tokens, ascending, on the CPU."""
        return (~self.protected).nonzero().squeeze(1)

    @cached_property
    def grid(self) -> tuple[int, int, int] | None:
        """(T, H, W) where the tokens are a full grid of one block in raster order, else None."""
        if len(self) == 0:
            return None
        low, high = self.coords.amin(0), self.coords.amax(0)
        t, h, w = (int(side) for side in (high - low + 1)[1:])
        if t * h * w != len(self) or int(high[0]) != int(low[0]):
            return None
        full = Layout.from_grid((t, h, w)).coords
        return (t, h, w) if torch.equal(self.coords - low, full) else None

    def select(self, index: Tensor) -> Layout:
        """The layout of the tokens at ``index`` (1-D)."""
        index = index.cpu()
        return Layout(self.coords[index], self.protected[index], extents=self.extents)

    def protect(self, mask: Tensor) -> Layout:
        """The same layout with more protected tokens."""
        return Layout(self.coords, self.protected | mask.cpu(), extents=self.extents)

    def within(self, regions: Iterable[Sequence[float | Fraction]]) -> Tensor:
        """``(N,)`` which tokens show a part of some region.

        A token shows the cell of its block's grid where it stands; cells that a region only
        touches do not count. All frames of a clip and all blocks count alike.

        Args:
            regions: boxes (x0, y0, x1, y1) relative to the picture, from 0 to 1.

        Raises:
            TokensError: if a region is malformed, or it is not known what a token shows.
        """
        boxes = [as_region(region) for region in regions]
        block, _, y, x = self.coords.unbind(1)
        inside = torch.zeros(len(self), dtype=torch.bool)
        unknown = sorted({*block.tolist()} - {*self.extents})
        if boxes and unknown:
            raise TokensError(
                f"regions cannot be protected: it is not known which part of the picture the "
                f"tokens of {self!r} show (blocks {', '.join(map(str, unknown))}). Tokens of a "
                "Q-Former have no place, and some processors do not tell how they cut tiles: turn "
                "tiling off, or leave the regions out."
            )
        for number, (rows, columns) in self.extents.items():
            for x0, y0, x1, y1 in boxes:
                high = (y >= math.floor(y0 * rows)) & (y < math.ceil(y1 * rows))
                wide = (x >= math.floor(x0 * columns)) & (x < math.ceil(x1 * columns))
                inside |= (block == number) & high & wide
        return inside

    def __repr__(self) -> str:
        shape = f"grid={self.grid}" if self.grid else f"tokens={len(self)}"
        return f"Layout({shape}, protected={self.protected_count})"


def _require_tensors(**values: object) -> None:
    """Refuse anything but tensors, and None for what may be left out.

    Raises:
        TokensError: naming the argument.
    """
    for name, value in values.items():
        optional = name in ("protected", "sizes", "values")
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise TokensError(f"{name} must be a torch tensor, got {type(value).__name__}.")


@lru_cache(maxsize=1024)
def _line(length: int) -> Layout:
    return Layout(Layout.from_grid((1, 1, length)).coords)


@lru_cache(maxsize=1024)
def _full_grid(t: int, h: int, w: int, block: int) -> Layout:
    """Shared, since the same grids come with every image: layouts do not change."""
    axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    coords = torch.stack([torch.full_like(axes[0], block), *axes], dim=-1)
    return Layout(coords.reshape(-1, 4), extents={block: (h, w)})


class VisualTokens:
    """A dense batch of ``B`` visual items that share one layout of ``N`` tokens.

    There is no padding: the framework stores items packed and buckets those of equal layout.

    Args:
        features: ``(B, N, D)`` floating point.
        coords: a :class:`Layout`, or ``(N, 4)`` integers (block, t, y, x).
        protected: ``(N,)`` booleans; only with ``coords`` given as a tensor.
        sizes: ``(B, N)`` how many source tokens each token stands for; ones if omitted.
        signals: named tensors, see :mod:`tokenreduce.signals`.
        values: ``(B, N, V)`` what outputs are made of, where that is not what strategies compare;
            the features if omitted.

    Raises:
        TokensError: if a shape or a type is wrong.
        UnknownName: if a signal is not in the vocabulary.
    """

    def __init__(
        self,
        features: Tensor,
        coords: Layout | Tensor,
        *,
        protected: Tensor | None = None,
        sizes: Tensor | None = None,
        signals: Mapping[str, Tensor] | None = None,
        values: Tensor | None = None,
    ) -> None:
        _require_tensors(features=features, sizes=sizes, values=values, **dict(signals or {}))
        if features.ndim != 3 or not features.is_floating_point():
            raise TokensError(
                "features must be floating point of shape (batch, tokens, channels), got "
                f"{features.dtype} {tuple(features.shape)}."
            )
        if isinstance(coords, Layout) and protected is not None:
            raise TokensError("give protected to the Layout, not beside it.")
        layout = coords if isinstance(coords, Layout) else Layout(coords, protected)
        batch, n, _ = features.shape
        if len(layout) != n:
            raise TokensError(
                f"coords describe {len(layout)} tokens, features hold {n} "
                f"(shape {tuple(features.shape)})."
            )
        if sizes is not None and (sizes.shape != (batch, n) or not sizes.is_floating_point()):
            raise TokensError(
                f"sizes must be floating point of shape {(batch, n)}, got {sizes.dtype} "
                f"{tuple(sizes.shape)}."
            )
        if values is not None and (
            values.shape[:2] != (batch, n) or values.ndim != 3 or values.dtype != features.dtype
        ):
            raise TokensError(
                f"values must be of shape {(batch, n)} with channels and of the features' type, "
                f"got {values.dtype} {tuple(values.shape)}."
            )
        self.features = features
        self.values = features if values is None else values
        self.layout = layout
        self._sizes = sizes
        self.signals = MappingProxyType(dict(signals or {}))
        for name, signal in self.signals.items():
            record = installed().signals[name]
            expected = (batch, n) if record.per_token else (batch,)
            if tuple(signal.shape[: len(expected)]) != expected or signal.ndim != len(record.dims):
                raise TokensError(
                    f"signal {name!r} must have axes ({', '.join(record.dims)}) with "
                    f"{expected} first, got shape {tuple(signal.shape)}."
                )

    @classmethod
    def from_grid(
        cls,
        features: Tensor,
        grid: Sequence[int],
        *,
        signals: Mapping[str, Tensor] | None = None,
    ) -> VisualTokens:
        """Tokens of an image or clip in raster order.

        Args:
            features: ``(B, N, D)``, or ``(N, D)`` for a single item.
            grid: (T, H, W) or (H, W) in tokens; its product is N.
            signals: as for the class.

        Raises:
            TokensError: if the grid does not hold N tokens.
        """
        _require_tensors(features=features)
        if features.ndim == 2:
            features = features[None]
        return cls(features, Layout.from_grid(grid), signals=signals)

    @property
    def batch(self) -> int:
        """Number of items, B."""
        return self.features.shape[0]

    @property
    def count(self) -> int:
        """Number of tokens of each item, N."""
        return self.features.shape[1]

    @property
    def coords(self) -> Tensor:
        """``(N, 4)`` (block, t, y, x) on the features' device."""
        return self.layout.coords.to(self.features.device)

    @property
    def protected(self) -> Tensor:
        """``(N,)`` tokens that must survive, on the features' device."""
        return self.layout.protected.to(self.features.device)

    @property
    def _own_values(self) -> bool:
        return self.values is self.features

    @property
    def has_sizes(self) -> bool:
        """Whether tokens stand for other numbers of source tokens than one."""
        return self._sizes is not None

    @property
    def sizes(self) -> Tensor:
        """``(B, N)`` float32: how many source tokens each token stands for."""
        if self._sizes is None:
            return self.features.new_ones(self.features.shape[:2], dtype=torch.float32)
        return self._sizes

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """(T, H, W) where the tokens are a full grid in raster order, else None."""
        return self.layout.grid

    def require_grid(self, strategy: str) -> tuple[int, int, int]:
        """The grid, for strategies that cannot do without.

        Raises:
            TokensError: if the tokens do not form a full grid.
        """
        if self.grid is None:
            raise TokensError(
                f"{strategy} needs tokens that form a full (t, y, x) grid in raster order; these "
                f"{self.count} tokens do not (tiles, a Q-Former, or an earlier stage that "
                "dropped some). Use it as the first stage, or wrap it in per_tile."
            )
        return self.grid

    def signal(self, name: str) -> Tensor:
        """A named signal.

        Raises:
            MissingSignal: if these tokens do not carry it.
        """
        try:
            return self.signals[name]
        except KeyError:
            raise MissingSignal(
                f"the strategy needs the signal {name!r}; these tokens carry "
                f"{', '.join(self.signals) or 'none'}. Give it as signals={{{name!r}: ...}}, or "
                "use a strategy that reads features only."
            ) from None

    def select(self, index: Tensor) -> VisualTokens:
        """The tokens at ``index`` (1-D, the same for every item), signals included."""
        on_device = index.to(self.features.device)
        vocabulary = installed().signals
        return VisualTokens(
            self.features.index_select(1, on_device),
            self.layout.select(index),
            sizes=None if self._sizes is None else self._sizes.index_select(1, on_device),
            signals={
                name: signal.index_select(1, on_device) if vocabulary[name].per_token else signal
                for name, signal in self.signals.items()
            },
            values=None if self._own_values else self.values.index_select(1, on_device),
        )

    def item(self, index: int) -> VisualTokens:
        """One item of the batch, as a batch of one."""
        return VisualTokens(
            self.features[index : index + 1],
            self.layout,
            sizes=None if self._sizes is None else self._sizes[index : index + 1],
            signals={name: signal[index : index + 1] for name, signal in self.signals.items()},
            values=None if self._own_values else self.values[index : index + 1],
        )

    def __repr__(self) -> str:
        b, n, d = self.features.shape
        return f"VisualTokens(batch={b}, tokens={n}, channels={d}, {self.layout!r})"

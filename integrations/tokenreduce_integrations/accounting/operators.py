"""FLOPs of single operators: torch's formulas, and those that it lacks.

A multiplication and an addition are two FLOPs. Matrix products of any kind count, however their
weights are stored; elementwise work, reductions, lookups and sorting do not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., int]

#: Products of activations ``(..., K)`` with weights; the output says the rest.
_PRODUCTS = (
    "aten._int_mm",
    "aten._weight_int8pack_mm",
    "aten._weight_int4pack_mm",
    "aten._weight_int4pack_mm_for_cpu",
    "aten._dyn_quant_matmul_4bit",
    "aten.dot",
    "aten.mv",
    "bitsandbytes.int8_mixed_scaled_mm",
    "bitsandbytes.int8_scaled_mm",
    "bitsandbytes.int8_linear_matmul",
    "bitsandbytes.gemv_4bit",
    "bitsandbytes.gemm_4bit",
    "quanto.qbytes_mm",
    "quanto.gemm_f16i4",
    "quanto.gemm_f16i4_awq",
    "quanto.gemm_f16f8_marlin",
    "quanto.gemm_f16i4_marlin",
)
_ATTENTION = (
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_attention_math_for_mps",
    "aten._scaled_dot_product_fused_attention_overrideable",
)
#: Names of operators of torch's own that do products or factorizations.
_COSTLY = re.compile(
    r"(^|_)(mm|bmm|matmul|linear|conv\w*|convolution\w*|attention|dot|vdot|cdist\w*|einsum|"
    r"bilinear|solve\w*|cholesky\w*|svd|eig\w*|qr|lu|lstsq|inv\w*|det|slogdet|lstm|gru|rnn\w*|"
    r"fft\w*|stft|grouped|pdist\w*|addr|outer|ger)(_|$)"
)
#: In a library of kernels, operators that only change how numbers are stored.
_STORAGE = re.compile(r"quant|pack")
_OWN = ("aten", "prim", "prims", "profiler")


def formulas() -> dict[Any, Formula]:
    """Formulas of the operators that are installed here and that torch does not count."""
    table: dict[str, Formula] = {
        **dict.fromkeys(_PRODUCTS, _product),
        **dict.fromkeys(_ATTENTION, _attention),
        "aten._cdist_forward": _distances,
        "aten._pdist_forward": _own_distances,
        "aten.linalg_qr": _qr,
        "aten._linalg_svd": _svd,
        "aten._linalg_eigh": _eigh,
        "aten.linalg_cholesky_ex": _cholesky,
        "aten.linalg_solve_triangular": _triangular,
    }
    found = ((_operator(name), formula) for name, formula in table.items())
    return {operator: _raw(formula) for operator, formula in found if operator is not None}


def is_costly(operator: Any) -> bool:
    """Whether an operator without a formula may do work that ought to be counted."""
    space, _, name = str(operator).partition(".")
    if space in _OWN:
        return _COSTLY.search(name) is not None
    return _STORAGE.search(name) is None


def _operator(name: str) -> Any | None:
    space, _, operator = name.partition(".")
    return getattr(getattr(torch.ops, space), operator, None)


def _raw(formula: Formula) -> Formula:
    """Have torch hand the tensors themselves over, not their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def _product(activations: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    output = out_val[0] if isinstance(out_val, tuple) else out_val
    if output is None:
        output = kwargs.get("out", args[-1] if args else activations)
    return 2 * int(output.numel()) * activations.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    pairs: int = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _distances(first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    """A difference, its power, and a sum, for each pair and channel."""
    batch: int = math.prod(torch.broadcast_shapes(first.shape[:-2], second.shape[:-2]))
    return 3 * batch * first.shape[-2] * second.shape[-2] * first.shape[-1]


def _own_distances(points: Tensor, *_: Any, **__: Any) -> int:
    count, width = points.shape
    return 3 * int(width * count * (count - 1)) // 2


def _sides(matrix: Tensor) -> tuple[int, int, int]:
    """Batch, longer and shorter side."""
    rows, columns = matrix.shape[-2:]
    return math.prod(matrix.shape[:-2]), max(rows, columns), min(rows, columns)


def _qr(matrix: Tensor, *_: Any, **__: Any) -> int:
    """Householder, with Q formed (Golub and Van Loan, 5.2)."""
    batch, long, short = _sides(matrix)
    return batch * (4 * long * short**2 - 4 * short**3 // 3)


def _svd(matrix: Tensor, *_: Any, **__: Any) -> int:
    """Both sets of vectors, thin (Golub and Van Loan, 8.6)."""
    batch, long, short = _sides(matrix)
    return batch * (6 * long * short**2 + 20 * short**3)


def _eigh(matrix: Tensor, *_: Any, **__: Any) -> int:
    """With vectors (Golub and Van Loan, 8.3)."""
    batch, side = _sides(matrix)[:2]
    return batch * 9 * side**3


def _cholesky(matrix: Tensor, *_: Any, **__: Any) -> int:
    batch, side = _sides(matrix)[:2]
    return batch * side**3 // 3


def _triangular(matrix: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return int(right.numel()) * matrix.shape[-1]

"""How far Gram matrices are from the exact ones, relative to sqrt(G_ii G_jj)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LIMIT = 1e-9
KINDS = ("normal", "constant", "heavy-tailed", "badly scaled")
_COUNT = 4
_CHUNK = 1 << 20


def made_rows(kind: str, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Updates of one kind  # 4 x [P]"""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(_COUNT):
        row = torch.randn(length, generator=generator)
        if kind == "constant":  # all products round the same way
            row.fill_((i + 1) / 3)
        elif kind == "heavy-tailed":
            row.cauchy_(generator=generator)
        elif kind == "badly scaled":  # 10 orders of magnitude in a row, 18 between rows
            row *= torch.pow(10.0, torch.rand(length, generator=generator) * 10 - 5) * 10.0 ** (6 * i - 9)
        rows.append(row.to(dtype))
    return rows


def exact_gram(rows: Sequence[Tensor]) -> np.ndarray:
    """Products in float64, where those of float32 values are exact, and sums with 64 bits or more  # [N, N]

    Raises:
        RuntimeError: This platform's long double is no wider than float64.
    """
    if np.finfo(np.longdouble).nmant < 63:
        raise RuntimeError("The exact sums need a long double of 64 bits. Got that of float64")
    gram = np.zeros((len(rows), len(rows)), dtype=np.longdouble)
    for pieces in zip(*(row.split(_CHUNK) for row in rows), strict=True):
        values = [piece.double().numpy() for piece in pieces]
        for i, left in enumerate(values):
            for j in range(i, len(values)):
                gram[i, j] += np.sum(left * values[j], dtype=np.longdouble)
    return np.triu(gram) + np.triu(gram, 1).T


def error(gram: Tensor, exact: np.ndarray) -> float:
    """Largest deviation relative to sqrt(G_ii G_jj); NaN stays NaN."""
    lengths = np.sqrt(np.diag(exact))
    deviation: np.ndarray = np.abs(gram.double().numpy() - exact) / np.outer(lengths, lengths)
    return float(deviation.max())

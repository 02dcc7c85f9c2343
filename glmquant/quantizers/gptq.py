"""GPTQ: every rounding error is made up for by the columns that are still to be rounded.

Wanted are codes for which the *output* of a layer changes least: ``trace(E H E^T)`` for the errors E = W - W' and the
second moments H = E[x x^T] of the layer's inputs. Write ``H = T^T T`` with T lower triangular. Then the loss of a row
with errors e is a sum over columns,

    sum_i  T_ii^2 (c_i - w'_i)^2      with      c_i = w_i + sum_{j<i} (T_ij / T_ii) e_j

and rounding column after column to the point of the grid that is nearest to c_i is GPTQ (Frantar et al. 2022, arXiv
2210.17323; that the two are one is shown by Chen et al. 2025, arXiv 2507.18553). Written like this there is no inverse
of H, which halves memory and arithmetic, and the loss of a group is known before the columns behind it are looked at:
scales are searched with the very procedure that rounds with them.

Columns are taken in the order of importance, ``H_ii``, but only as far as groups stay together: the groups in the order
of their sums, the columns in order inside of their group. Nothing has to be stored about that, unlike with GPTQ's
``desc_act``, which is slow in every engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import QuantizationError
from ..scheme import QuantizedTensor, Scheme
from . import native
from .grid import absmax, asymmetric_grid, divided
from .mse import LeastSquares

# Rows that are worked on together. On a CPU the candidates of a group shall stay in the caches; a GPU shall have enough
# to do in every one of many small steps.
_ROWS, _GPU_ROWS = 512, 16384
_MOST_COLUMNS = 128  # of a group whose scale is searched; scales of whole rows are set beforehand


@dataclass(frozen=True)
class Gptq:
    """See the module.

    Attributes:
        damping: added to the diagonal of H, relative to its mean; ten times as much, and so on, where H has no
            factors in float32. GPTQ's own 0.01 fits the text too closely: 0.1 is no worse on other text of its kind,
            and a fifth better on text of another kind.
        ranges: clipping ranges that are tried for every group, relative to the one in which the extreme of the group
            just gets code ``qmin``.
        finer: multiples of the best scale among those that are tried next.
        refits: how often the best of them is moved to the least squares of the codes that it gives.
    """

    damping: float = 0.1
    ranges: tuple[float, ...] = (1.1, 1.0, 0.9, 0.8, 0.7)
    finer: tuple[float, ...] = (0.95, 1.05)
    refits: int = 1

    @torch.no_grad()
    def __call__(self, weight: Tensor, scheme: Scheme, statistics: Tensor | None = None) -> QuantizedTensor:
        """See `Quantizer`; `statistics` is H, float32 [columns, columns]. Without it this is `LeastSquares`."""
        if statistics is None:
            return LeastSquares()(weight, scheme)
        absmax(weight, scheme)  # refuses NaN and Inf
        columns = weight.shape[1]
        width = scheme.group_size or columns
        order = column_order(statistics, width)
        undo = torch.argsort(order)
        groups = torch.argsort(order[::width] // width)
        factor, gains = self._factor(statistics, order)
        fixed = LeastSquares()(weight, scheme) if width > _MOST_COLUMNS else None
        solved = []
        step = _ROWS if weight.device.type == "cpu" else _GPU_ROWS
        for start in range(0, len(weight), step):
            rows = weight[start : start + step].float()[:, order].t().contiguous()
            given = None
            if fixed is not None:
                given = _Grid.of(fixed.rows(start, start + rows.shape[1]))
            codes, grid = self._solve(rows, factor, gains, scheme, given)
            solved.append((codes[undo].t(), grid.scale[groups].t(), grid.zero_point[groups].t()))
        codes, scale, zero_point = (torch.cat(parts).contiguous() for parts in zip(*solved, strict=True))
        zeros = None if scheme.symmetric else zero_point.to(torch.int8)
        return QuantizedTensor(codes, scheme.store_scale(scale), zeros, scheme)

    def _factor(self, hessian: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """``T_ij / T_ii`` and ``T_ii^2`` of the Hessian with its columns in `order`. At 14,000 columns a matrix takes
        750 MiB: there are never more than three.
        """
        mean = hessian.diagonal().mean().clamp_(min=torch.finfo(torch.float32).tiny)
        if not torch.isfinite(mean):
            raise QuantizationError("the text makes NaN or infinity of its inputs")
        last_first = order.flip(0)
        damping, failed = self.damping, 1
        while failed:
            damped = hessian[last_first[:, None], last_first]
            damped.diagonal().add_(damping * mean)
            lower, info = torch.linalg.cholesky_ex(damped)
            failed, damping = int(info), 10 * damping
        del damped
        factor = lower.flip(0, 1).t()
        diagonal = factor.diagonal().clone()
        return factor.div_(diagonal[:, None]), diagonal.square_()

    def _solve(
        self, weight: Tensor, factor: Tensor, gains: Tensor, scheme: Scheme, given: _Grid | None
    ) -> tuple[Tensor, _Grid]:
        """Codes and grids for rows that are given as columns, in their final order.

        Args:
            weight: float32 [columns, rows].
            factor: see `_factor`.
            gains: see `_factor`.
            scheme: what codes there are.
            given: the grid, where it is not to be searched.
        """
        columns = len(weight)
        width = scheme.group_size or columns
        step = min(width, _MOST_COLUMNS)
        errors = torch.empty_like(weight)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        grids = []
        for start in range(0, columns, step):
            stop = min(columns, start + step)
            base = weight[start:stop]
            target = torch.addmm(base, factor[start:stop, :start], errors[:start])
            group = _Group(
                base, target, factor[start:stop, start:stop].contiguous(), gains[start:stop], scheme
            )
            grid, found = self._search(group) if given is None else (given, group.best(given)[1])
            codes[start:stop], errors[start:stop] = found.codes[:, 0], found.errors[:, 0]
            grids.append(grid)
        if given is not None:
            return codes, given
        return codes, _Grid(*(torch.cat([getattr(g, f) for g in grids]) for f in ("scale", "zero_point")))

    def _search(self, group: _Group) -> tuple[_Grid, _Rounded]:
        """The best grid of each row, [1, rows], and what comes of it."""
        grid, found = group.best(group.candidates(self.ranges))
        tries: list[Callable[[_Grid, _Rounded], _Grid]] = (
            [lambda g, f: group.scaled(g, self.finer)] if self.finer else []
        )
        for each in (*tries, *[group.refitted] * self.refits):
            moved, tried = group.best(each(grid, found))
            better = tried.loss < found.loss
            grid, found = grid.where(better, moved), found.where(better, tried)
        return grid, found


def column_order(hessian: Tensor, width: int) -> Tensor:
    """The order in which columns are rounded: see the module.

    Args:
        hessian: [columns, columns].
        width: columns in a group.
    """
    importance = hessian.diagonal().view(-1, width)
    inside = torch.argsort(importance, dim=1, descending=True, stable=True)
    groups = torch.argsort(importance.sum(1), descending=True, stable=True)
    first = torch.arange(0, hessian.shape[0], width, device=hessian.device)
    return (inside + first[:, None])[groups].flatten()


@dataclass(frozen=True)
class _Grid:
    """Candidates for the grid of a group in every row: scale (as stored) and zero point, float32 [k, rows]."""

    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, tensor: QuantizedTensor) -> _Grid:
        scale = tensor.scale.t().float()
        return cls(
            scale, torch.zeros_like(scale) if tensor.zero_point is None else tensor.zero_point.t().float()
        )

    def gather(self, which: Tensor) -> _Grid:
        return _Grid(self.scale.gather(0, which), self.zero_point.gather(0, which))

    def where(self, better: Tensor, other: _Grid) -> _Grid:
        scale = torch.where(better, other.scale, self.scale)
        return _Grid(scale, torch.where(better, other.zero_point, self.zero_point))


@dataclass(frozen=True)
class _Rounded:
    """What came of k grids: codes and errors [columns, k, rows], loss [k, rows]."""

    codes: Tensor
    errors: Tensor
    loss: Tensor

    def gather(self, which: Tensor) -> _Rounded:
        wide = which.expand(len(self.codes), 1, -1)
        return _Rounded(self.codes.gather(1, wide), self.errors.gather(1, wide), self.loss.gather(0, which))

    def where(self, better: Tensor, other: _Rounded) -> _Rounded:
        return _Rounded(*(
            torch.where(better, getattr(other, f), getattr(self, f)) for f in ("codes", "errors", "loss")
        ))  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """Columns that are rounded one after the other.

    Attributes:
        base: the weights w, [columns, rows].
        target: c as far as it is known from the groups before.
        factor: ``T_ij / T_ii`` inside of the group.
        gains: ``T_ii^2``.
        scheme: what codes there are.
    """

    base: Tensor
    target: Tensor
    factor: Tensor
    gains: Tensor
    scheme: Scheme

    def best(self, grid: _Grid) -> tuple[_Grid, _Rounded]:
        """The candidate of `grid` with the least loss in every row, [1, rows], and what comes of it."""
        tiny = torch.finfo(torch.float32).tiny
        inverse = torch.where(grid.scale.abs() < tiny, 0, 1 / grid.scale)
        parts = (grid.scale.contiguous(), inverse.contiguous(), grid.zero_point.contiguous())
        onward = self.factor.t().contiguous()
        done = native.rounded_in_turn(self.base, self.target, onward, self.gains, parts, self.scheme)
        if done is not None:
            return grid.gather(done[0]), _Rounded(*done[1:])
        found = self._round(grid, inverse)
        least = found.loss.argmin(0, keepdim=True)
        return grid.gather(least), found.gather(least)

    def _round(self, grid: _Grid, inverse: Tensor) -> _Rounded:
        """Round to each candidate of `grid`. The compiled kernel takes sums in the same order."""
        lowest, highest = self.scheme.qmin - grid.zero_point, self.scheme.qmax - grid.zero_point
        wanted = self.target.unsqueeze(1).repeat(1, len(grid.scale), 1)
        codes, errors = torch.empty_like(wanted), torch.empty_like(wanted)
        loss = torch.zeros_like(grid.scale)
        for i, code in enumerate(codes):
            torch.mul(wanted[i], inverse, out=code).round_()
            torch.minimum(torch.maximum(code, lowest, out=code), highest, out=code)
            value = code * grid.scale
            torch.sub(self.base[i], value, out=errors[i])
            loss.add_(value.sub_(wanted[i]).square_().mul_(self.gains[i]))
            # Two roundings: one operation for both would be free to take one.
            wanted[i + 1 :].add_(errors[i] * self.factor[i + 1 :, i, None, None])
        return _Rounded(codes.add_(grid.zero_point), errors, loss)

    def candidates(self, ranges: tuple[float, ...]) -> _Grid:
        """Grids for clipping ranges, relative to the whole range of the weights as they are before the group."""
        relative = torch.tensor(ranges, device=self.base.device)[:, None]
        if self.scheme.bits == 8:
            relative = 1 - (1 - relative) / 8  # the best range is near the whole one and worth little
        if self.scheme.symmetric:
            largest = self.target.abs().amax(0)
            # The extreme goes to the side of qmin, which has one more code.
            sign = torch.where(self.target.amax(0) == largest, -1.0, 1.0)
            scale = self._stored(relative * divided(largest * sign, -self.scheme.qmin))
            return _Grid(scale, torch.zeros_like(scale))
        low, high = self.target.amin(0).clamp_(max=0), self.target.amax(0).clamp_(min=0)
        scale, zero_point = asymmetric_grid(relative * low, relative * high, self.scheme)
        return _Grid(scale.float(), zero_point)

    def scaled(self, grid: _Grid, factors: tuple[float, ...]) -> _Grid:
        """Multiples of the scales of one candidate, [1, rows]."""
        wide = torch.tensor(factors, device=self.base.device)[:, None]
        if self.scheme.bits == 8:
            wide = 1 - (1 - wide) / 8
        return _Grid(self._stored(wide * grid.scale), grid.zero_point.expand(len(factors), -1))

    def refitted(self, grid: _Grid, rounded: _Rounded) -> _Grid:
        """The scales with the least loss for these codes: of one candidate, [1, rows]."""
        reach = self.factor @ (rounded.codes[:, 0] - grid.zero_point)
        whole = self.factor @ self.base + (self.target - self.base)
        gains = self.gains[:, None]
        scale = (gains * whole * reach).sum(0) / (gains * reach * reach).sum(0)
        scale = torch.where(scale.isfinite(), scale, grid.scale[0])
        return _Grid(self._stored(scale[None]), grid.zero_point)

    def _stored(self, scale: Tensor) -> Tensor:
        return self.scheme.store_scale(scale).float()

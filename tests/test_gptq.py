"""GPTQ and weighted least squares against slow solvers written here, and on what they are for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers_weights import WEIGHT_KINDS, random_weight
from torch import Tensor

from glmquant import QuantizationError, Scheme, _native
from glmquant.quantizers import Gptq, Hqq, LeastSquares, Quantizer, RoundToNearest, WeightedLeastSquares
from glmquant.quantizers.gptq import column_order

SCHEMES = [
    Scheme(4, 32),
    Scheme(4, 64, symmetric=False, scale_dtype="bfloat16"),
    Scheme(4, None),
    Scheme(8, 32, scale_dtype="float32"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(columns: int, tokens: int = 1024, seed: int = 0) -> Tensor:
    """Correlated, of unlike sizes, and with a mean, as the inputs of layers are: [tokens, columns]."""
    mixing = torch.Generator().manual_seed(99)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=mixing) / columns**0.5 + torch.eye(columns)
    sizes = torch.randn(columns, generator=mixing).exp()
    mean = torch.randn(columns, generator=mixing)
    return (torch.randn(tokens, columns, generator=generator) @ mix + mean) * sizes


def second_moments(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def output_error(weight: Tensor, found: Tensor, x: Tensor) -> float:
    return float(((weight.double() - found.double()) @ x.double().t()).square().sum())


def solved_slowly(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, order: list[int], scheme: Scheme
) -> Tensor:
    """Optimal brain quantization, column by column: what is left is moved to where it makes up best for the error of
    the column just rounded, by the inverse of what is left of the Hessian, computed anew each time. Float64.
    """
    left, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int8)
    width = weight.shape[1] // scale.shape[1]
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(hessian.double()[rest][:, rest])
        grid, origin = scale[:, column // width].double(), zero[:, column // width].double()
        code = (torch.round(left[:, column] / grid) + origin).clamp(scheme.qmin, scheme.qmax)
        error = left[:, column] - (code - origin) * grid
        left[:, rest] -= error[:, None] * inverse[0] / inverse[0, 0]
        codes[:, column] = code.to(torch.int8)
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_columns_are_updated_as_a_slow_exact_solver_does_it(scheme: Scheme) -> None:
    weight, hessian = random_weight("gaussian", 24, 128).float(), second_moments(inputs(128))
    found = Gptq()(weight, scheme, hessian)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(128)
    zero = torch.zeros_like(found.scale) if found.zero_point is None else found.zero_point
    order = column_order(hessian, scheme.group_size or 128).tolist()
    codes = solved_slowly(weight, damped, found.scale.float(), zero, order, scheme)
    # float32 here, float64 there: a value halfway between two codes may go to either
    assert int((found.codes != codes).sum()) <= (3 if scheme.bits == 8 else 0)
    assert output_error(weight, found.dequantize(), inputs(128)) > 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_the_output_is_nearer_on_inputs_that_calibration_has_not_seen(kind: str, scheme: Scheme) -> None:
    weight = random_weight(kind, 48, 192).float()
    seen, unseen = inputs(192, seed=1), inputs(192, seed=2)

    def error(quantizer: Quantizer, statistics: Tensor | None) -> float:
        return output_error(weight, quantizer(weight, scheme, statistics).dequantize(), unseen)

    gptq = error(Gptq(), second_moments(seen))
    assert gptq < 0.75 * error(RoundToNearest(), None)
    assert gptq < error(LeastSquares(), None)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_searching_scales_with_the_rounding_itself_beats_the_whole_range(scheme: Scheme) -> None:
    if scheme.group_size is None:
        return  # set beforehand
    weight, x = random_weight("heavy-tail", 64, 128).float(), inputs(128)
    found = [
        output_error(weight, quantizer(weight, scheme, second_moments(x)).dequantize(), x)
        for quantizer in (Gptq(), Gptq(ranges=(1.0,), finer=(), refits=0))
    ]
    assert found[0] < found[1]


@pytest.mark.skipif(_native.library() is None, reason=f"no kernels: {_native.why_not()}")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_the_compiled_kernel_gives_the_bytes_of_torch(
    kind: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that fill no vector, a row of zeros, a group too small for an inverse, and inputs that never come."""
    weight, x = random_weight(kind, 45, 192).float(), inputs(192)
    weight[3] = 0
    weight[4, 64:128] *= 1e-42
    x[:, 64:80] = 0
    found = Gptq()(weight, scheme, second_moments(x))
    monkeypatch.setattr(_native, "_loaded", _native._Loaded(None, "a test"))
    expected = Gptq()(weight, scheme, second_moments(x))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    if expected.zero_point is not None:
        assert found.zero_point is not None
        assert torch.equal(found.zero_point, expected.zero_point)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("scheme", [Scheme(4, 32, False), Scheme(4, 128, False, "float32")], ids=str)
def test_free_zero_points_lower_the_squared_error(kind: str, scheme: Scheme) -> None:
    weight = random_weight(kind, 64, 256).float()
    error = [
        float((q(weight, scheme).dequantize() - weight).norm())
        for q in (Hqq(), LeastSquares(), RoundToNearest())
    ]
    assert error[0] < error[1] < error[2]
    assert torch.equal(
        Hqq()(weight, scheme).codes, torch.cat([Hqq()(w, scheme).codes for w in weight.split(8)])
    )


def test_columns_go_in_the_order_of_importance_inside_of_their_groups() -> None:
    hessian = torch.diag(torch.tensor([1.0, 4, 2, 3, 9, 1, 8, 7]))
    assert column_order(hessian, 4).tolist() == [4, 6, 7, 5, 1, 3, 2, 0]
    assert column_order(hessian, 8).tolist() == [4, 6, 7, 1, 3, 2, 0, 5]


def test_the_order_is_undone_exactly() -> None:
    """Columns in another order inside of their groups, and groups in another order, give the same codes there."""
    weight, hessian = random_weight("gaussian", 16, 128).float(), second_moments(inputs(128))
    generator = torch.Generator().manual_seed(5)
    inside = [torch.randperm(32, generator=generator) for _ in range(4)]
    groups = torch.randperm(4, generator=generator)
    order = torch.cat([inside[g] + 32 * g for g in groups.tolist()])
    found = Gptq()(weight, Scheme(4, 32), hessian)
    shuffled = Gptq()(weight[:, order].contiguous(), Scheme(4, 32), hessian[order][:, order].contiguous())
    assert torch.equal(found.codes[:, order], shuffled.codes)
    assert torch.equal(found.scale[:, groups], shuffled.scale)


@pytest.mark.parametrize("quantizer", [Gptq(), WeightedLeastSquares()], ids=["gptq", "weighted-mse"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_bytes_are_the_same_on_every_run_and_a_split_weight_gets_those_of_the_whole(
    quantizer: Quantizer, scheme: Scheme
) -> None:
    weight, hessian = random_weight("laplace", 96, 128), second_moments(inputs(128))
    whole, again = (quantizer(weight, scheme, hessian) for _ in range(2))
    assert torch.equal(whole.codes, again.codes)
    assert torch.equal(whole.scale, again.scale)
    first, second = (quantizer(part.contiguous(), scheme, hessian) for part in weight.split([32, 64]))
    assert torch.equal(whole.scale, torch.cat([first.scale, second.scale]))
    assert torch.equal(whole.codes, torch.cat([first.codes, second.codes]))


@pytest.mark.parametrize("quantizer", [Gptq(), WeightedLeastSquares()], ids=["gptq", "weighted-mse"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_stay_zeros_and_inputs_that_never_come_do_no_harm(quantizer: Quantizer, scheme: Scheme) -> None:
    weight = random_weight("gaussian", 16, 128)
    weight[3] = 0
    weight[4, 32:64] = 0
    x = inputs(128)
    x[:, 64:96] = 0
    found = quantizer(weight, scheme, second_moments(x))
    exact = found.dequantize()
    assert torch.isfinite(exact).all()
    assert not exact[3].any()
    assert not quantizer(weight, scheme, torch.zeros(128, 128)).dequantize()[3].any()
    unused = (exact - weight.float())[:, 64:96].norm() / weight[:, 64:96].float().norm()
    assert float(unused) < (0.3 if scheme.bits == 4 else 0.02)


@pytest.mark.parametrize("quantizer", [Gptq(), WeightedLeastSquares()], ids=["gptq", "weighted-mse"])
def test_what_is_no_number_is_refused(quantizer: Quantizer) -> None:
    weight = random_weight("gaussian", 8, 64)
    weight[2, 5] = float("nan")
    with pytest.raises(QuantizationError, match="NaN"):
        quantizer(weight, Scheme(4, 32), torch.eye(64))


def test_inputs_that_are_no_numbers_are_refused() -> None:
    hessian = torch.eye(64)
    hessian[3, 3] = float("inf")
    with pytest.raises(QuantizationError, match="inputs"):
        Gptq()(random_weight("gaussian", 8, 64), Scheme(4, 32), hessian)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weighted_least_squares_is_best_at_its_own_objective(scheme: Scheme) -> None:
    weight, importance = random_weight("gaussian", 64, 128).float(), inputs(128).square().mean(0)

    def weighted(quantizer: Quantizer, statistics: Tensor | None) -> float:
        error = quantizer(weight, scheme, statistics).dequantize() - weight
        return float((error.square() * importance).sum())

    found = weighted(WeightedLeastSquares(), importance)
    assert found < weighted(LeastSquares(), None)
    assert found < weighted(RoundToNearest(), None)
    assert torch.equal(
        WeightedLeastSquares()(weight, scheme, importance).codes,
        WeightedLeastSquares()(weight, scheme, torch.diag(importance)).codes,
    )

"""The numbers of quantized weights, GPTQ against rounding to nearest, and the engine's integers against torch's."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from migician.export.fit import Fitted, Fitter, pack, row_grid  # noqa: E402
from migician.export.gptq import gptq_rows, gram  # noqa: E402
from migician.export.grid import (  # noqa: E402
    dequantize_activations,
    int4_grid,
    int8_grid,
    integer_sums,
    quantize_activations,
)
from migician.runtime.backends import native as engine  # noqa: E402
from migician.runtime.files.tensors import Tensor as Stored  # noqa: E402


def _random(*shape: int, seed: int = 0, spread: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * spread


def _correlated(rows: int, columns: int, seed: int = 0):
    return _random(rows, columns, seed=seed) @ (_random(columns, columns, seed=seed + 1) / columns**0.5) + 0.2


def test_scales_are_exact_in_half_precision() -> None:
    for spread in (1e-6, 1e-3, 0.05, 30.0):
        w = _random(64, 256, spread=spread) * torch.rand(64, 1).exp()
        eight, four = int8_grid(w), int4_grid(w, 64)
        for grid in (eight, four):
            assert torch.equal(grid.scale, grid.scale.half().float())
            assert torch.equal(grid.scale * 2**24, (grid.scale * 2**24).round())
        steps = four.scale[:, None] * four.factor
        assert torch.equal(steps, steps.half().float())
        assert int(four.factor.min()) >= 1 and int(four.factor.max()) <= 16


def test_rounding_stays_within_half_a_step_where_nothing_is_clipped() -> None:
    w = _random(32, 128)
    grid = int8_grid(w)
    assert ((grid.dequantize(grid.round(w)) - w).abs() <= 0.5001 * grid.scale[:, None]).all()
    assert int(grid.round(w).abs().max()) <= 127
    four = int4_grid(w, 32)
    q = four.round(w)
    assert int(q.min()) >= -8 and int(q.max()) <= 7
    relative = float((four.dequantize(q) - w).norm() / w.norm())
    assert 0.05 < relative < 0.11
    assert torch.equal(four.int8(q).float() * four.scale[:, None], four.dequantize(q))


def test_a_row_of_zeros_and_a_single_outlier() -> None:
    w = torch.zeros(3, 64)
    w[1, 5], w[2] = 1000.0, 1e-9
    for grid in (int8_grid(w), int4_grid(w, 16)):
        back = grid.dequantize(grid.round(w))
        assert torch.isfinite(back).all() and torch.equal(back[0], torch.zeros(64))
        assert abs(float(back[1, 5]) - 1000) < 80


def test_importance_lowers_the_error_that_it_weighs() -> None:
    w, weight = _random(64, 256), torch.rand(256, generator=torch.Generator().manual_seed(3)) ** 8
    def error(grid):
        return float(((grid.dequantize(grid.round(w)) - w).square() * weight).sum())
    assert error(int4_grid(w, 128, weight)) < error(int4_grid(w, 128))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("columns", [64, 192, 320])
def test_gptq_beats_rounding_on_its_own_calibration(kind: str, columns: int) -> None:
    w, x = _random(48, columns), _correlated(600, columns)
    hessian = gram(x)
    grid = row_grid(kind, w, 128, hessian.diagonal())
    nearest, (q, damping) = grid.round(w), gptq_rows(w, hessian.clone(), grid)
    assert q.dtype == torch.int8 and q.shape == w.shape and damping == 0.01
    assert int(q.min()) >= grid.bounds[0] and int(q.max()) <= grid.bounds[1]
    errors = [float((x @ (grid.dequantize(codes) - w).T).norm()) for codes in (nearest, q)]
    assert errors[1] < 0.8 * errors[0]


def test_gptq_without_information_is_rounding() -> None:
    w = _random(16, 64)
    grid = int8_grid(w)
    assert torch.equal(gptq_rows(w, torch.zeros(64, 64), grid).q, grid.round(w))
    assert torch.equal(gptq_rows(w, torch.eye(64), grid).q, grid.round(w))  # no correlations, nothing to make up for
    with pytest.raises(ValueError, match="Hessian"):
        gptq_rows(w, torch.eye(32), grid)


def test_gptq_takes_more_damping_where_it_must() -> None:
    w, grid = _random(16, 64), int8_grid(_random(16, 64))
    broken = torch.eye(64) - 0.02 * torch.ones(64, 64)  # one eigenvalue is -0.28
    rounded = gptq_rows(w, broken, grid)
    assert rounded.damping >= 0.3 and torch.isfinite(rounded.q.float()).all()
    hopeless = torch.full((64, 64), float("nan"))
    assert torch.equal(gptq_rows(w, hopeless, grid).q, grid.round(w))


def test_weighted_rows_count_as_if_repeated() -> None:
    x, weight = _random(5, 8), torch.tensor([1.0, 2, 1, 3, 1])
    repeated = x.repeat_interleave(weight.long(), 0)
    torch.testing.assert_close(gram(x, weight), gram(repeated), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gram(repeated), repeated.T @ repeated / len(repeated), atol=1e-6, rtol=1e-5)


def test_activations_round_ties_to_even_and_zero_rows_stay_zero() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0], [1e-35, -1e-36, 0, 0]])
    q, scale = quantize_activations(x)
    assert q.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [0, 0, 0, 0]] and scale[:2].tolist() == [1.0, 0.0]
    y = _random(7, 40)
    q, scale = quantize_activations(y)
    assert torch.equal(dequantize_activations(y), q.float() * scale[:, None])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(33, 48, 1), (64, 192, 5), (100, 640, 3), (16, 8960, 2)])
def test_the_engine_sums_as_torch_does_bit_for_bit(kind: str, rows: int, columns: int, tokens: int) -> None:
    w, x = _random(rows, columns, spread=0.02), _random(tokens, columns, seed=9) * 3
    x[-1] *= 1e-33 if tokens > 2 else 1
    grid = row_grid(kind, w, 128)
    fitted = Fitted(grid.round(w), grid)
    stored = {name: _stored(name, tensor) for name, tensor in pack("m", fitted).items()}
    pool = engine.Pool(2)
    sums, scales = engine.integer_sums(pool, stored["m.weight"], stored.get("m.weight_group"), x.numpy())
    want = integer_sums(x, fitted.q, grid)
    assert np.array_equal(sums[:, :rows], want.numpy()) and not sums[:, rows:].any()
    assert np.array_equal(scales, quantize_activations(x)[1].numpy())


def _stored(name: str, tensor) -> Stored:
    kind = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32"}[tensor.dtype]
    return Stored(name, kind, tuple(tensor.shape), np.frombuffer(tensor.numpy().tobytes(), np.uint8))


def test_a_fitter_applies_what_it_fitted() -> None:
    w, bias, x = _random(32, 64), _random(32, seed=1), _correlated(300, 64)
    fitter = Fitter({"a.weight": w, "a.bias": bias, "b.weight": w.clone()}, {"a": "int4", "b": "bf16"}, 128)
    torch.testing.assert_close(fitter.apply("a", x), x @ w.T + bias)
    fitter.fit(["a", "b"], x)
    assert set(fitter.fitted) == {"a"} and set(fitter.weights) == {"a.bias", "b.weight"}
    dense = fitter.fitted["a"].dequantized()
    torch.testing.assert_close(fitter.apply("a", x), dequantize_activations(x) @ dense.T + bias)
    same = Fitter({"a.weight": w, "a.bias": bias}, {"a": "int4"}, 128, engine.Pool(2))
    same.fit(["a"], x)
    assert all(torch.equal(same.stored[name], tensor) for name, tensor in fitter.stored.items())
    torch.testing.assert_close(same.apply("a", x), fitter.apply("a", x))
    report = fitter.fitted["a"].report
    assert report is not None and report.output_error < report.rtn_output_error < 0.2
    unseen = Fitter({"a.weight": w}, {"a": "int8"}, 128)
    unseen.fit(["a"], None)
    report = unseen.fitted["a"].report
    assert report is not None and report.output_error is None and report.weight_error < 0.01

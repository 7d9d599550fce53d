"""Codes at two bits: both ways, and products of them."""

from __future__ import annotations

import runpy

import pytest
import torch

from moetool.kernels import two_bits

CODES = torch.randint(-1, 2, (24, 20), generator=torch.Generator().manual_seed(0)).to(torch.int8)
HALF = torch.tensor([0.5])
DTYPES = (torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)


def test_packing_is_as_written_down_and_exact_both_ways() -> None:
    bytes_ = two_bits.packed(CODES)
    assert bytes_.shape == (24, 5) and bytes_.dtype == torch.uint8
    first = sum((int(c) + 1) << 2 * i for i, c in enumerate(CODES[0, :4]))
    assert int(bytes_[0, 0]) == first
    for dtype in DTYPES:
        again = two_bits.unpacked(bytes_, dtype)
        assert again.dtype == dtype and torch.equal(again, CODES.to(dtype))


@pytest.mark.parametrize("tokens", [1, 7])
def test_products_and_their_gradients(tokens: int) -> None:
    x = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(tokens))
    bytes_, wide = two_bits.packed(CODES), x.double() @ CODES.double().T * 0.5
    assert torch.allclose(two_bits.product(x, bytes_, HALF).double(), wide, atol=1e-5)
    assert torch.allclose(two_bits.product(x.double(), bytes_, HALF), wide, atol=1e-12)
    for dtype, least in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        half = two_bits.product(x.to(dtype), bytes_, HALF)
        wanted = x.to(dtype).double() @ CODES.double().T * 0.5
        assert half.dtype == dtype and (half - wanted).abs().max() <= least * wanted.abs().max()
    x.requires_grad_()
    grad = torch.randn(tokens, 24)
    for rounded in (False, True):
        x.grad = None
        scale = HALF.clone().requires_grad_()
        two_bits.product(x, bytes_, scale, rounded).backward(grad)
        assert x.grad is not None
        assert torch.allclose(x.grad.double(), grad.double() @ CODES.double() * 0.5, atol=1e-5)
        made = two_bits.product(x, bytes_, HALF * 2, rounded)
        assert torch.allclose(scale.grad, (grad * made).sum(), rtol=1e-4)


@pytest.mark.parametrize("in_digits", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_either_way_of_multiplying_is_near_beside_a_large_number(
    tokens: int, in_digits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_bits, "_BYTES", in_digits)
    draw = torch.Generator().manual_seed(tokens)
    codes = torch.randint(-1, 2, (24, 160), generator=draw).to(torch.int8)
    x, bytes_ = torch.randn(tokens, 160, generator=draw), two_bits.packed(codes)
    x[:, 3] *= 1000
    once = two_bits.Once()
    for given in (x, x * 2, x.T.contiguous().T):
        made = two_bits.product(given, bytes_, HALF, once=once)
        wanted = given.double() @ codes.double().T * 0.5
        assert (made.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_rounded_activations_are_whole_steps_of_each_tokens_largest() -> None:
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(3))
    step = x.double().abs().amax(-1, keepdim=True) / 127
    wanted = (x.double() / step).round() * step
    made = two_bits.product(x, two_bits.packed(CODES), HALF, rounded=True)
    assert torch.allclose(made.double(), wanted @ CODES.double().T * 0.5, atol=1e-5)
    assert torch.allclose(two_bits.rounded(x).double(), wanted, atol=1e-6)


def test_it_may_be_imported_while_a_model_is_built_elsewhere() -> None:
    """transformers builds models on the meta device, and experts import this then."""
    with torch.device("meta"):
        held = runpy.run_path(two_bits.__file__)
    codes = CODES[:, :16]
    made = held["product"](torch.ones(2, 16), two_bits.packed(codes), HALF)
    assert torch.allclose(made, codes.float().sum(1).expand(2, -1) / 2)

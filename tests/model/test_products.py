import subprocess
import sys

import pytest
import torch

from weitiao.model import products

needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def off(ours, exact):
    return float((ours.double() - exact).abs().max() / exact.abs().max())


@needs_mkldnn
@pytest.mark.parametrize(("m", "k", "n"), [(300, 200, 250), (3, 2000, 1000), (1, 1000, 1000), (500, 8, 300), (300, 300, 7), (0, 5, 4), (2, 2, 2)])
@pytest.mark.parametrize("across", [(False, False), (True, False), (False, True), (True, True)])
def test_a_product_in_either_order_of_both(m, k, n, across):
    a = drawn(k, m).t() if across[0] else drawn(m, k)
    b = drawn(n, k).t() if across[1] else drawn(k, n)
    made = products.mm(a, b)
    assert made.shape == (m, n) and made.dtype is torch.float32
    if m:
        assert off(made, a.double() @ b.double()) < 2e-6


@needs_mkldnn
@pytest.mark.parametrize("c", [(300, 250), (250,), (1, 250), (300, 1), ()])
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 1), (1, 2.0), (0, 1)])
def test_a_sum_with_whatever_it_is_that_is_added(c, beta, alpha):
    a, b, c = drawn(300, 200), drawn(250, 200).t(), drawn(*c)
    made = products.addmm(c, a, b, beta=beta, alpha=alpha)
    assert made.shape == (300, 250)
    assert off(made, beta * c.double() + alpha * (a.double() @ b.double())) < 2e-6


@needs_mkldnn
def test_columns_of_a_wider_matrix_are_not_taken_to_onednns_reference_code():
    wide = drawn(4000, 64)
    assert not products._takes(drawn(500, 4000), wide[:, 8:40]) and not products._takes(wide[:, 8:40], drawn(32, 400))
    assert products._takes(drawn(500, 4000), wide) and products._takes(wide, drawn(32, 64).t())


IN_A_PROCESS = """
import warnings
import torch
from weitiao.model import products

warnings.simplefilter("error")
products.is_quicker = lambda: {here}
products.use()
products.use()  # a second time changes nothing
seen = []
plain = products._takes
products._takes = lambda a, b: seen.append((plain(a, b), tuple(a.shape))) or seen[-1][0]

torch.manual_seed(0)
layer, x = torch.nn.Linear(200, 300), torch.randn(2, 200, 200, requires_grad=True)
cotangent = torch.randn(2, 200, 300)
found = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], cotangent)
layer, x, cotangent = layer.double(), x.double().detach().requires_grad_(), cotangent.double()
exact = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], cotangent)
assert max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact)) < 2e-6
for kind in (torch.bfloat16, torch.int64, torch.float64):
    a, b = torch.arange(6).view(2, 3).to(kind), torch.arange(6).view(3, 2).to(kind)
    assert (a @ b).dtype is kind and (a @ b).tolist() == [[10, 13], [28, 40]]
assert torch.addmm(torch.ones(2), torch.ones(2, 3), torch.ones(3, 2)).tolist() == [[4, 4], [4, 4]]
for a, b in ((torch.ones(2, 3), torch.ones(2, 3)), (torch.ones(300, 200), torch.ones(300, 250))):
    try:
        a @ b
    except RuntimeError as error:
        assert "cannot be multiplied" in str(error)
    else:
        raise AssertionError
added = torch.addmm(torch.ones(300, 1).expand(300, 250), torch.ones(300, 200), torch.ones(200, 250))
assert torch.equal(added, torch.full((300, 250), 201.0))
assert torch.func.vmap(torch.mm)(torch.ones(2, 100, 100), torch.ones(2, 100, 100)).eq(100).all()
print(sorted({shape for taken, shape in seen if taken}))
"""


@needs_mkldnn
@pytest.mark.parametrize("here", [True, False])
def test_once_in_use_linears_and_their_gradients_go_by_it(here):
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS.replace("{here}", str(here))], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    sides = {(400, 200), (400, 300), (300, 400), (300, 200)}  # x, the gradient, the same transposed; the sum's
    assert done.stdout.strip() == (str(sorted(sides)) if here else "[]")


@pytest.mark.parametrize(("vendor", "wide", "taken"), [("AuthenticAMD", True, True), ("GenuineIntel", True, False), ("AuthenticAMD", False, False)])
def test_it_is_taken_where_mkl_does_not_know_the_processor(vendor, wide, taken, monkeypatch):
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: wide)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products.is_quicker.__wrapped__() is taken

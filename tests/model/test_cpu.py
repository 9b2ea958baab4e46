"""Attention as this machine's compiler built it, judged by the dense mask in float64."""

from __future__ import annotations

import functools
import os
import subprocess

import numpy as np
import pytest
import torch
from conftest import example

from weitiao.data.batch import trie_batch
from weitiao.model import attention, compiled, cpu
from weitiao.trie import build

KINDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(params=list(KINDS), ids=str)
def kind(request):
    if reason := cpu.trouble(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def plan():
    """Rows of up to 200 tokens that part in many places: 64 does not divide anything here."""
    noise = np.random.default_rng(0)
    stem = noise.integers(0, 9, 90)
    rows = [np.concatenate([stem[: noise.integers(20, 91)], noise.integers(0, 9, noise.integers(1, 110))]) for _ in range(9)]
    return trie_batch(build([example(row, 1) for row in rows]))["trie"]


def drawn(plan, kind, heads=6, kv_heads=2, width=64, prefix=0, size=1.0):
    """query, key, value and a gradient, as projections leave them: heads side by side in a token's row."""
    noise = torch.Generator().manual_seed(1)
    nodes = len(plan.depth)
    shapes = (nodes, heads), (prefix + nodes, kv_heads), (prefix + nodes, kv_heads), (nodes, heads)
    return [(size * torch.randn(1, rows, count, width, generator=noise)).to(kind).transpose(1, 2) for rows, count in shapes]


def results(function, inputs, cotangent):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


def off(plan, kind, **shape) -> float:
    *inputs, cotangent = drawn(plan, kind, **shape)
    ours = results(lambda q, k, v: cpu.attend(q, k, v, plan, 0.2, None, 0.0), inputs, cotangent)
    exact = results(lambda q, k, v: attention.dense(q, k, v, plan, 0.2), [x.double() for x in inputs], cotangent)
    assert all(x.dtype is kind for x in ours)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("shape", [{}, {"prefix": 1}, {"prefix": 70}, {"heads": 1, "kv_heads": 1, "width": 32}, {"heads": 2, "width": 96}, {"heads": 4, "width": 128}, {"heads": 7, "kv_heads": 1}, {"heads": 10}], ids=str)
def test_output_and_gradients_are_the_dense_masks(plan, kind, shape):
    assert off(plan, kind, **shape) < KINDS[kind]


def test_rows_that_share_nothing_do_not_see_the_blocks_before(kind):
    """Of the second block of queries, six see keys of the first block, the other 58 none but of later ones."""
    noise = np.random.default_rng(2)
    rows = [np.concatenate([[first], noise.integers(2, 9, length)]) for first, length in ((0, 69), (1, 79))]
    assert off(trie_batch(build([example(row, 1) for row in rows]))["trie"], kind) < KINDS[kind]


@pytest.mark.parametrize("threads", [1, 2, 5, 40])
def test_any_number_of_threads_computes_the_same(plan, kind, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert off(plan, kind) < KINDS[kind]
    finally:
        torch.set_num_threads(before)


def test_the_same_threads_give_the_same_bits(plan, kind):
    *inputs, cotangent = drawn(plan, kind)
    one, other = (results(lambda q, k, v: cpu.attend(q, k, v, plan, 0.2, None, 0.0), inputs, cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_an_earlier_call_left_in_memory_does_no_harm(plan, kind):
    """Blocks are kept from call to call, and of one that is seen in part not all is written."""
    *inputs, cotangent = drawn(plan, kind)
    worse = [torch.full_like(x, float("nan")) for x in inputs]
    before = results(lambda q, k, v: cpu.attend(q, k, v, plan, 0.2, None, 0.0), inputs, cotangent)
    assert results(lambda q, k, v: cpu.attend(q, k, v, plan, 0.2, None, 0.0), worse, cotangent)[0].isnan().all()
    after = results(lambda q, k, v: cpu.attend(q, k, v, plan, 0.2, None, 0.0), inputs, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_processor_that_multiplies_no_bfloat16_computes_in_float32(plan, monkeypatch):
    if reason := cpu.trouble(torch.bfloat16):
        pytest.skip(reason)
    monkeypatch.setattr(cpu, "computes_halves", lambda: False)
    assert off(plan, torch.bfloat16, prefix=3) < KINDS[torch.bfloat16]
    *inputs, cotangent = drawn(plan, torch.bfloat16)
    halves, wide = (results(lambda q, k, v: cpu.attend(q, k, v, plan, 0.2, None, 0.0), [x.to(kind) for x in inputs], cotangent)
                    for kind in (torch.bfloat16, torch.float32))
    assert torch.equal(halves[0], wide[0].bfloat16())


def test_scores_far_apart_leave_no_number_behind_that_is_none(plan):
    if reason := cpu.trouble(torch.float32):
        pytest.skip(reason)
    *inputs, cotangent = drawn(plan, torch.float32, size=12.0)  # scores up to some thousands, seen and unseen
    ours = results(lambda q, k, v: cpu.attend(q, k, v, plan, 0.2, None, 0.0), inputs, cotangent)
    exact = results(lambda q, k, v: attention.dense(q, k, v, plan, 0.2), [x.double() for x in inputs], cotangent)
    for a, b in zip(ours, exact, strict=True):
        assert bool(a.isfinite().all())
        assert float((a.double() - b).norm() / b.norm()) < 1e-3  # a softmax of scores of 1,000 is as exact as their last bit


def test_rows_one_behind_the_other_in_memory_are_read_as_well(plan, kind):
    *inputs, cotangent = drawn(plan, kind)
    apart = results(lambda q, k, v: cpu.attend(q, k, v, plan, 0.2, None, 0.0), inputs, cotangent)
    dense = results(lambda q, k, v: cpu.attend(q, k, v, plan, 0.2, None, 0.0), [x.contiguous() for x in inputs], cotangent.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(apart, dense, strict=True))


def test_a_library_finds_its_tiles_as_it_left_them(plan):
    if reason := cpu.trouble(torch.bfloat16):
        pytest.skip(reason)
    noise = torch.Generator().manual_seed(2)
    a, b = (torch.randn(70, 70, generator=noise).bfloat16() for _ in range(2))
    before = a @ b
    off(plan, torch.bfloat16)
    assert torch.equal(a @ b, before)
    assert float((before.double() - a.double() @ b.double()).abs().max()) < 0.2


@pytest.mark.parametrize(("kind", "shape", "window", "dropout"), [
    (torch.float64, {}, None, 0.0), (torch.float32, {"width": 8}, None, 0.0), (torch.float32, {}, 3, 0.0), (torch.float32, {}, None, 0.1),
])
def test_what_it_does_not_compute_is_left_to_others(plan, kind, shape, window, dropout):
    query, key, value, _ = drawn(plan, kind, **shape)
    assert cpu.attend(query, key, value, plan, 0.2, window, dropout) is None


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As in a process that has not looked for a compiler yet, with an empty cache."""
    monkeypatch.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    for module, cached in ((cpu, cpu.trouble), (cpu, cpu._library), (cpu, cpu.computes_halves), (compiled, compiled.loaded), (compiled, compiled.compiler)):
        monkeypatch.setattr(module, cached.__name__, functools.cache(cached.__wrapped__))
    return tmp_path


def test_without_a_compiler_pytorchs_kernels_do_it(plan, anew, monkeypatch):
    monkeypatch.setenv("PATH", str(anew))
    assert cpu.trouble(torch.float32) == "No C compiler is here (gcc)."
    *inputs, cotangent = drawn(plan, torch.float32)
    ours = results(lambda q, k, v: attention.attend_within(q, k, v, plan, 0.2, None), inputs, cotangent)
    exact = results(lambda q, k, v: attention.dense(q, k, v, plan, 0.2), [x.double() for x in inputs], cotangent)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, exact, strict=True)) < 1e-4


def test_a_compiler_that_fails_is_named_with_what_it_says(anew, monkeypatch):
    broken = anew / "broken-cc"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'cannot do that' >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert cpu.trouble(torch.float32) == f"{broken} ends with 3: cannot do that"


@pytest.mark.parametrize("without", ["-mno-amx-bf16", "-mno-avx512bf16"])  # products of pairs; none of bfloat16 at all
def test_processors_that_lack_something_compute_bfloat16_as_well(without, plan, anew, monkeypatch):
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, without))
    if reason := cpu.trouble(torch.bfloat16):
        pytest.skip(reason)
    assert not (without == "-mno-avx512bf16" and cpu.computes_halves())
    assert off(plan, torch.bfloat16, prefix=3) < KINDS[torch.bfloat16]


def test_what_goes_by_tiles_is_built_everywhere(tmp_path):
    """A processor without them cannot run it, but its compiler sees it."""
    try:
        compiler = compiled.compiler()
    except compiled.NotBuilt as reason:
        pytest.skip(str(reason))
    source = compiled.NATIVE / "attention.c"
    flags = ["-march=sapphirerapids" if flag == "-march=native" else flag for flag in compiled.FLAGS]
    probe = subprocess.run([compiler, *flags, "-E", "-dM", "-x", "c", os.devnull], capture_output=True, text=True)
    if "__AMX_BF16__" not in probe.stdout:
        pytest.skip(f"{compiler} knows no tiles")
    done = subprocess.run([compiler, *flags, "-Wall", "-Werror", "-c", str(source), "-o", str(tmp_path / "tiles.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_narrower_vectors_are_left_to_pytorch(anew, monkeypatch):
    try:
        compiled.compiler()
    except compiled.NotBuilt as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(compiled, "FLAGS", tuple(flag for flag in compiled.FLAGS if flag != "-march=native"))
    assert "AVX-512" in cpu.trouble(torch.float32)


def test_it_can_be_forbidden(anew, monkeypatch):
    monkeypatch.setenv("WEITIAO_COMPILE", "0")
    assert "forbids" in cpu.trouble(torch.float32)


def test_what_computes_wrongly_is_not_taken(anew, monkeypatch):
    if reason := cpu.trouble(torch.float32):
        pytest.skip(reason)
    cpu.trouble.cache_clear()
    monkeypatch.setattr(cpu, "_trial", lambda kind: 0.1)
    assert "off by 0.1" in cpu.trouble(torch.float32)


def test_it_is_built_once(anew):
    if reason := cpu.trouble(torch.float32):
        pytest.skip(reason)
    (built,) = (anew / "cache" / "built").glob("kernels-*.so")
    stamp = built.stat().st_mtime_ns
    assert compiled._built("kernels") == built and built.stat().st_mtime_ns == stamp


def test_other_types_are_named_and_not_tried():
    assert cpu.trouble(torch.float16) == "It computes float32 and bfloat16, not float16."


def test_what_is_no_number_stays_none(plan, kind):
    *inputs, _ = drawn(plan, kind)
    inputs[0][0, 3, 100] = float("nan")
    out = cpu.attend(*inputs, plan, 0.2, None, 0.0)
    assert bool(out[0, 3, 100].isnan().all()) and int(out.isnan().sum()) == out.shape[-1]


@pytest.mark.parametrize(("heads", "kv_heads", "threads"), [(1, 1, 3), (8, 8, 3), (9, 3, 2), (12, 2, 5), (32, 8, 7), (6, 6, 64), (12, 12, 16), (32, 32, 16)])
def test_each_thread_has_room_for_the_heads_it_meets(plan, kind, heads, kv_heads, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert off(plan, kind, heads=heads, kv_heads=kv_heads, width=32) < KINDS[kind]
    finally:
        torch.set_num_threads(before)

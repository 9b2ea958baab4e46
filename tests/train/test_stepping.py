"""Steps a weight at a time: bf16 weights that keep small steps, and steps inside the backward pass, which are the same steps."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_model
from test_loop import losses, make_rows, training, uninterrupted

from weitiao import config
from weitiao.errors import SettingError, TrainingStopped
from weitiao.train import stepping
from weitiao.train.folder import RunFolder
from weitiao.train.stepping import ByWeight, joined, refuse_unfit, round_stochastically, split

HALF = {"name": "tiny", "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Most weights of a tiny model are several pieces."""
    monkeypatch.setattr(stepping, "PIECE", 1024)


def half_model():
    return tiny_model(seed=1).to(torch.bfloat16)


def made(tokenizer, half=True, run=None, rows=20, **more):
    return training(tokenizer, make_rows(rows), method="full", run=run, model=half_model() if half else tiny_model(seed=1),
                    of_model=HALF if half else {"name": "tiny"}, **{"learning_rate": 1e-3, "epochs": 2} | more)


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_bf16_and_the_16_bits_below_it_are_fp32_to_the_bit():
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (200_000,))
    bits = torch.cat([bits, torch.tensor([0, 0x3F808000, 0x3F807FFF, 0x3F818000, -(1 << 31), 0x7F7FFFFF, 0x00000001])]).to(torch.int32)
    wide = bits.view(torch.float32)
    wide = wide[torch.isfinite(wide)]
    half = torch.empty(len(wide), dtype=torch.bfloat16)
    low = split(wide, half)
    assert low.dtype is torch.int16
    assert torch.equal(joined(half, low).view(torch.int32), wide.view(torch.int32))
    ties = (wide.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(half[~ties], wide.bfloat16()[~ties])  # a tie goes away from 0, and to even in torch


def test_stochastic_rounding_is_right_on_the_average_and_leaves_what_bf16_has():
    wide = torch.tensor([1.0, 1.0 + 1 / 512, -1.0 - 1 / 1024, 3e-39, 0.0]).repeat(40_000, 1)
    half = torch.empty(wide.shape, dtype=torch.bfloat16)
    round_stochastically(wide.clone(), half, torch.Generator().manual_seed(0))
    assert half[:, 0].unique().tolist() == [1.0] and half[:, 4].unique().tolist() == [0.0]
    assert half[:, 1].unique().tolist() == [1.0, 1.0078125]
    mean = half.double().mean(dim=0)
    assert mean[1] - 1 == pytest.approx(1 / 512, rel=0.03)
    assert mean[2] + 1 == pytest.approx(-1 / 1024, rel=0.05)


# ------------------------------------------------------------------------------------------------------ bf16 that learns


@pytest.mark.parametrize("rounding, learns", [("auto", True), ("compensated", True), ("stochastic", True), ("nearest", False)])
def test_small_steps_of_bf16_weights_count(tokenizer, rounding, learns):
    """100 steps of about 1/1,000 of a weight that was 1 or more."""
    model = half_model()
    weight = model.model.norm.weight
    with torch.no_grad():
        weight.fill_(2.0)
    trained = training(tokenizer, make_rows(6), method="full", model=model, of_model=HALF, rounding=rounding, learning_rate=1e-3, epochs=100,
                       scheduler="constant", warmup=0)
    trained.fit()
    assert trained.by_weight is None if rounding == "nearest" else trained.by_weight.rounding == ("stochastic" if rounding == "auto" else rounding)
    moved = float((weight.float() - 2.0).abs().mean())
    assert moved > 0.01 if learns else moved == 0.0


def test_compensated_it_is_training_in_float32_with_gradients_at_the_rounded_weights(tokenizer):
    """The judge: torch's AdamW over float32 weights by hand, whose gradients are those of the bf16 model."""
    ours = made(tokenizer, rounding="compensated", max_grad_norm=0.0, epochs=2)
    model = half_model()
    wide = {name: torch.nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    judge = made(tokenizer, rounding="nearest", max_grad_norm=0.0, epochs=2)  # for its gradients alone
    optimizer = torch.optim.AdamW(wide.values(), lr=1e-3, weight_decay=0.0, fused=True)
    from weitiao.train.optimizer import make_scheduler

    scheduler = make_scheduler(optimizer, judge.settings.training, judge.schedule.steps)
    for step in range(1, 9):
        with torch.no_grad():
            for name, p in judge.plain_model.named_parameters():
                p.copy_(wide[name])
        examples = [e for i in judge.schedule.rows_of(step) for e in judge.rows[i].examples]
        judge._gradients(step, judge._passes(examples), sum(float(e.weights.sum()) for e in examples))
        for name, p in judge.plain_model.named_parameters():
            wide[name].grad = p.grad.float()
        judge._forget_gradients()
        optimizer.step()
        scheduler.step()
    ours.fit()
    for name, p in ours.plain_model.named_parameters():
        pieces = ours.by_weight.pieces[p]
        found = torch.cat([joined(piece.of(p.detach()).view(-1), ours.optimizer.optimizer.state[piece.stand_in]["compensation"].view(-1))
                           for piece in pieces]).view_as(p)
        assert torch.equal(found, wide[name].detach()), name


@pytest.mark.parametrize("more", [
    {"rounding": "stochastic"}, {"rounding": "compensated"}, {"rounding": "compensated", "optimizer": "adamw_bnb_8bit"},
    {"rounding": "stochastic", "optimizer": "paged_adamw_8bit", "step_in_backward": True, "clipping": "each"},
    {"rounding": "stochastic", "optimizer": "adafactor"}, {"rounding": "stochastic", "optimizer": "sgd", "learning_rate": 0.1},
    {"rounding": "compensated", "step_in_backward": True}, {"rounding": "compensated", "optimizer": "lion_8bit"},
], ids=str)
def test_resumed_it_is_the_uninterrupted_run_bit_for_bit(tokenizer, tmp_path, more):
    if "8bit" in more.get("optimizer", ""):
        pytest.importorskip("bitsandbytes", reason="it brings the optimizer")
    found = losses(uninterrupted(lambda run: made(tokenizer, run=run, **more), tmp_path))
    assert len(found) == 8 and found[-1] < found[0]


# -------------------------------------------------------------------------------------------- steps in the backward pass


def like(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))


@pytest.mark.parametrize("half, more", [
    (False, {"max_grad_norm": 0.0}), (False, {}), (False, {"max_grad_norm": 0.01}), (False, {"max_grad_norm": 0.01, "budget": 40}),
    (True, {"max_grad_norm": 0.0}), (True, {"max_grad_norm": 0.0, "optimizer": "adafactor"}), (False, {"optimizer": "adafactor"}),
    (True, {"max_grad_norm": 0.0, "rounding": "compensated", "optimizer": "adamw_bnb_8bit"}),
    (False, {"max_grad_norm": 0.01, "optimizer": "rmsprop", "checkpoint": True}),
], ids=str)
def test_inside_the_backward_pass_it_is_the_same_step_bit_for_bit(tokenizer, half, more):
    """One pass or several, clipped by a length that was measured before or not clipped; checkpointed or not."""
    more = dict(more)
    if "8bit" in more.get("optimizer", ""):
        pytest.importorskip("bitsandbytes", reason="it brings the optimizer")
    checkpoint = more.pop("checkpoint", False)
    inside, after = (made(tokenizer, half, step_in_backward=asked, **more) for asked in (True, False))
    if checkpoint:
        from weitiao.model.load import checkpoint_activations

        checkpoint_activations(inside.plain_model)
    inside.fit(), after.fit()
    assert losses(inside) == losses(after) and losses(inside)[-1] < losses(inside)[0]
    assert like(inside, after)
    for a, b in zip(inside.listener.lines, after.listener.lines, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.02 if half else 1e-6)  # torch adds up bf16 norms in bf16


def test_no_two_gradients_of_large_weights_are_there_together(tokenizer):
    trained = made(tokenizer, False, step_in_backward=True, max_grad_norm=0.0)
    there = []
    take = trained.by_weight.take
    trained.by_weight.take = lambda weight: (there.append(sum(p.grad is not None for p in trained.parameters)), take(weight))
    trained.fit(last=1)
    assert len(there) == len(trained.parameters)
    assert max(there) == 1


def test_each_weight_is_clipped_by_itself(tokenizer):
    """SGD at rate 1 moves a weight by its gradient: by no more than max_grad_norm, and by all of it where it is shorter."""
    plain = made(tokenizer, False, optimizer="sgd", learning_rate=1.0, max_grad_norm=0.0, warmup=0, scheduler="constant")
    each = made(tokenizer, False, optimizer="sgd", learning_rate=1.0, step_in_backward=True, clipping="each", max_grad_norm=0.05, warmup=0, scheduler="constant")
    start = [p.detach().clone() for p in plain.parameters]
    plain.fit(last=1), each.fit(last=1)
    lengths = [float((p - s).norm()) for p, s in zip(plain.parameters, start, strict=True)]
    assert min(lengths) < 0.05 < max(lengths)
    for p, s, length in zip(each.parameters, start, lengths, strict=True):
        assert float((p - s).norm()) == pytest.approx(min(length, 0.05), rel=1e-4)
    assert each.listener.lines[0]["grad_norm"] == pytest.approx(plain.listener.lines[0]["grad_norm"])


def test_a_gradient_that_is_not_finite_stops_it_and_says_that_weights_were_stepped(tokenizer, tmp_path):
    def broken(**more):
        trained = made(tokenizer, False, run=RunFolder(tmp_path), step_in_backward=True, **more)
        trained.parameters[3].register_hook(lambda grad: grad * math.inf)
        return trained

    with pytest.raises(TrainingStopped, match="weights were stepped as it came, and are not saved. No checkpoint"):
        broken(clipping="each").fit()
    before = made(tokenizer, False)
    trained = broken()
    with pytest.raises(TrainingStopped, match="no weight was changed by it"):
        trained.fit()
    assert like(trained, before) and not RunFolder(tmp_path).checkpoints()


def test_a_loss_that_is_not_finite_changes_no_weight(tokenizer):
    trained = made(tokenizer, False, step_in_backward=True, max_grad_norm=0.0)
    with torch.no_grad():
        trained.parameters[0][10:] = math.nan
    start = [p.detach().clone() for p in trained.parameters]
    with pytest.raises(TrainingStopped, match="the loss is nan"):
        trained.fit()
    assert all(torch.equal(a.nan_to_num(), b.detach().nan_to_num()) for a, b in zip(start, trained.parameters, strict=True))


def test_a_stop_in_the_middle_of_a_step_changes_no_weight(tokenizer):
    calls = iter([False, False, True, True])
    trained = made(tokenizer, False, step_in_backward=True, max_grad_norm=0.0, budget=24, stop=lambda: next(calls))
    assert not trained.fit()
    assert trained.step == 0 and like(trained, made(tokenizer, False)) and all(p.grad is None for p in trained.parameters)


def test_beside_lora_the_adapter_is_stepped_as_it_comes(tokenizer):
    inside, after = (training(tokenizer, make_rows(), step_in_backward=asked) for asked in (True, False))
    inside.fit(), after.fit()
    assert losses(inside) == losses(after)


# ------------------------------------------------------------------------------------------------------------- refusals


def settings(**words):
    training = {k: v for k, v in words.items() if k not in ("method", "model")}
    return config.parse({"data": "rows.jsonl", "method": words.get("method", "full"), "model": words.get("model", HALF), "training": training})


@pytest.mark.parametrize("words, message", [
    ({"rounding": "compensated", "model": "tiny"}, "training.rounding goes with method=full and model.dtype=bfloat16"),
    ({"rounding": "stochastic", "method": "lora"}, "training.rounding goes with method=full and model.dtype=bfloat16"),
    ({"clipping": "each"}, "clipping=each goes with step_in_backward=true"),
    ({"clipping": "whole", "step_in_backward": True}, "clipping=whole wants all gradients at once"),
    ({"clipping": "each", "step_in_backward": True, "max_grad_norm": 0}, "clipping goes with max_grad_norm above 0"),
])
def test_settings_that_do_nothing_or_contradict_are_refused(words, message):
    with pytest.raises(SettingError, match=message):
        settings(**words)


@pytest.mark.parametrize("words, compute, processes, message", [
    ({"optimizer": "lbfgs", "learning_rate": 1}, torch.float32, 1, "Rounding of bf16 weights .training.rounding=stochastic. steps one weight at a time"),
    ({"optimizer": "stable_adamw", "step_in_backward": True, "model": "tiny"}, torch.float32, 1, "training.step_in_backward=true steps one weight"),
    ({"step_in_backward": True, "model": "tiny"}, torch.float16, 1, "does not go with fp16"),
    ({"step_in_backward": True}, torch.bfloat16, 2, "there are 2 processes"),
])
def test_what_cannot_step_a_weight_at_a_time_is_refused_before_anything_is_loaded(words, compute, processes, message):
    with pytest.raises(SettingError, match=message):
        refuse_unfit(settings(**words), compute, processes)


def test_plain_runs_step_all_at_once():
    assert ByWeight.of(settings(model="tiny")) is None
    refuse_unfit(settings(model="tiny", optimizer="lbfgs", learning_rate=1), torch.float16, 4)

"""Every optimizer that the tutorials name learns, goes on as it left off, and refuses what it cannot do."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_loop import losses, make_rows, training, uninterrupted

from weitiao import config
from weitiao.errors import SettingError, TrainingStopped
from weitiao.train.folder import RunFolder
from weitiao.train.optimizer import make_optimizer, refuse_unfit, takes_fused

NAMES = {  # as the tutorial writes them
    "SGD": torch.optim.SGD, "L-BFGS": torch.optim.LBFGS, "Rprop": torch.optim.Rprop, "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "AdaGrad": torch.optim.Adagrad, "AdaDelta": torch.optim.Adadelta,
}


def settings(method="lora", **values) -> config.Settings:
    return config.parse({"data": "rows.jsonl", "method": method, "training": values})


def advised(name: str, method: str) -> float:
    """The rate that a run without one begins with, or is told to begin with."""
    try:
        return settings(method, optimizer=name).learning_rate
    except SettingError as refusal:
        return float(str(refusal).splitlines()[0].rpartition("training.learning_rate=")[2].rstrip("."))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_the_tutorials_lowers_the_loss_at_the_advised_rate(tokenizer, name, method):
    made = training(tokenizer, make_rows(6), method=method, optimizer=name, learning_rate=advised(name, method), epochs=30)
    assert type(made.optimizer.optimizer) is NAMES[name]
    made.fit()
    assert losses(made)[-1] < losses(made)[0] - 0.02
    assert max(losses(made)) < losses(made)[0] + 0.1


def judged(name: str, rate: float, order: list, rows, **options) -> list[float]:
    """The judge: torch's optimizer and a loop by hand, rows padded side by side."""
    model = tiny_model(seed=1)
    optimizer = NAMES[name](model.parameters(), lr=rate, **options)
    found = []
    for indices in order:
        examples = [rows[i].examples[0] for i in indices]
        ids = torch.full((len(examples), max(map(len, examples))), 3)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for b, e in enumerate(examples):
            ids[b, : len(e)], mask[b, : len(e)] = torch.from_numpy(e.ids.astype("int64")), 1
            labels[b, : len(e)][torch.from_numpy(e.weights) > 0] = ids[b, : len(e)][torch.from_numpy(e.weights) > 0]
        measured = []

        def closure():
            optimizer.zero_grad()
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            if name != "L-BFGS":  # which measures slopes
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            measured.append(loss.item())
            return loss

        optimizer.step(closure)
        found.append(measured[0])
    return found


@pytest.mark.parametrize("name, rate, ours, options", [
    ("SGD", 0.3, "momentum=0.9,nesterov=true", {"momentum": 0.9, "nesterov": True}),
    ("L-BFGS", 0.5, "max_iter=3,line_search_fn=null", {"max_iter": 3, "history_size": 10}),
    ("L-BFGS", 1.0, "max_iter=3", {"max_iter": 3, "history_size": 10, "line_search_fn": "strong_wolfe"}),
    ("Rprop", 1e-3, "etas=[0.6, 1.3]", {"etas": (0.6, 1.3)}),
    ("AdaDelta", 1.0, "rho=0.8, eps=1e-5", {"rho": 0.8, "eps": 1e-5}),
])
@pytest.mark.parametrize("layout", ["trie", "padded"])
def test_a_loop_by_hand_gives_our_losses(tokenizer, layout, name, rate, ours, options):
    rows = make_rows(18)
    made = training(tokenizer, rows, layout, "full", budget=60, optimizer=name, learning_rate=rate, optimizer_options=ours, epochs=1, warmup=0,
                    **({} if name == "Rprop" else {"scheduler": "constant"}))
    made.fit()
    assert len(losses(made)) == 3
    assert losses(made) == pytest.approx(judged(name, rate, [made.schedule.rows_of(s) for s in (1, 2, 3)], rows, **options), rel=1e-3)


@pytest.mark.parametrize("name, rate, options", [
    ("lbfgs", 1.0, ""), ("lbfgs", 0.1, "line_search_fn=null,history_size=2"), ("rprop", 1e-3, ""), ("adadelta", 1.0, ""), ("adam", 1e-2, "amsgrad=true"),
    ("adagrad", 1e-2, ""), ("sgd", 0.1, "momentum=0.9"), ("rmsprop", 1e-3, "centered=true"),
])
def test_resumed_it_is_the_uninterrupted_run_bit_for_bit_dropout_included(tokenizer, tmp_path, name, rate, options):
    def start(run):
        return training(tokenizer, make_rows(), method={"name": "lora", "dropout": 0.1}, run=run, optimizer=name, learning_rate=rate,
                        optimizer_options=options)

    assert len(losses(uninterrupted(start, tmp_path))) == 8


@pytest.mark.parametrize("name", ["lbfgs", "adadelta", "adagrad", "adam"])
def test_the_scheduler_goes_on(tokenizer, name):
    made = training(tokenizer, make_rows(), optimizer=name, learning_rate=0.1, scheduler="linear", warmup=0)
    made.fit()
    assert [line["learning_rate"] for line in made.listener.lines] == pytest.approx([0.1 * (8 - s) / 8 for s in range(8)])


def test_those_that_build_on_their_first_step_have_no_warm_up_and_rprop_one_rate(tokenizer):
    def rates(name, **more):
        made = training(tokenizer, make_rows(), optimizer=name, learning_rate=0.01, epochs=10, **more)
        return [line["learning_rate"] for _ in [made.fit()] for line in made.listener.lines]

    assert rates("rprop") == [0.01] * 40
    assert rates("adam")[0] == 0 < rates("lbfgs")[0] == 0.01


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name, package", [("galore_adamw", "galore_torch"), ("galore_adafactor", "galore_torch"), ("apollo_adamw", "apollo_torch")])
def test_projected_optimizers_learn_keep_less_and_go_on_as_they_left_off(tokenizer, tmp_path, name, package, half):
    pytest.importorskip(package, reason="it brings the optimizer")

    def start(run):
        model = tiny_model(seed=1).to(torch.bfloat16 if half else torch.float32)
        return training(tokenizer, make_rows(), method="full", run=run, optimizer=name, learning_rate=1e-2, epochs=4, model=model,
                        optimizer_options="rank=4,update_proj_gap=3", of_model={"name": "tiny", "dtype": "bfloat16"} if half else "tiny",
                        step_in_backward=half, **({"clipping": "each"} if half else {}))

    found = losses(uninterrupted(start, tmp_path))
    assert found[-1] < found[0] - 0.1


@pytest.mark.parametrize("name, package", [("galore_adamw", "galore_torch"), ("apollo_adamw", "apollo_torch")])
def test_without_its_package_an_optimizer_is_refused_by_name(name, package, monkeypatch):
    monkeypatch.setattr(f"transformers.trainer_optimizer.is_{package}_available", lambda: False)
    with pytest.raises(SettingError, match=f"install `{package}`"):
        make_optimizer(tiny_model(), settings("full", optimizer=name).training, 1e-3)


@pytest.mark.parametrize("name, cure", [
    ("lomo", "training.optimizer=sgd with training.step_in_backward=true"), ("adalomo", "training.optimizer=adafactor with"),
    ("galore_adamw_layerwise", "training.optimizer=galore_adamw with"), ("apollo_adamw_layerwise", "training.optimizer=apollo_adamw with"),
    ("schedule_free_adamw", "for an evaluation and back"), ("galore_adamw_8bit", "training.optimizer=apollo_adamw"),
])
def test_those_with_a_loop_of_their_own_are_refused_with_what_does_instead(name, cure):
    with pytest.raises(SettingError, match=cure):
        refuse_unfit(settings("full", optimizer=name).training, torch.float32)


# ------------------------------------------------------------------------------------------------- L-BFGS in the loop


def lbfgs(tokenizer, **more):
    return training(tokenizer, make_rows(), **{"method": "full", "optimizer": "lbfgs", "learning_rate": 1.0, "budget": 40} | more)


def test_a_step_of_lbfgs_computes_its_passes_several_times_and_tells_the_first_loss(tokenizer):
    """The loss that a step tells is the one before the step: of step 1, that of any other optimizer."""
    searching, plain = lbfgs(tokenizer), lbfgs(tokenizer, optimizer="sgd")
    searching.fit(last=1)
    plain.fit(last=1)
    assert losses(searching) == losses(plain)
    state = searching.optimizer.optimizer.state[searching.parameters[0]]
    assert 1 < state["func_evals"] <= 7
    assert searching.listener.lines[0]["rows"] == 6


def test_its_memory_is_bounded(tokenizer):
    made = lbfgs(tokenizer, optimizer_options="history_size=3", epochs=3)
    made.fit()
    assert len(made.optimizer.optimizer.state[made.parameters[0]]["old_dirs"]) == 3


def test_weights_where_nothing_is_finite_stop_it_in_mid_step_and_are_not_saved(tokenizer, tmp_path):
    made = lbfgs(tokenizer, run=RunFolder(tmp_path), budget=4096, optimizer_options="line_search_fn=null")
    calls = itertools.count(1)
    made.parameters[0].register_hook(lambda grad: grad * float("inf") if next(calls) == 3 else grad)
    with pytest.raises(TrainingStopped, match=r"Step 1: lbfgs went from a loss of .* and the gradient (inf|nan)") as caught:
        made.fit()
    assert "is not saved. No checkpoint could be saved so far." in str(caught.value)
    assert losses(made) == [] and not RunFolder(tmp_path).checkpoints()


def test_a_stop_while_it_searches_waits_for_the_steps_end(tokenizer):
    calls = itertools.count(1)
    made = lbfgs(tokenizer, stop=lambda: next(calls) > 5)  # after the first passes, which may be given up
    assert not made.fit()
    reference = lbfgs(tokenizer)
    reference.fit(last=made.step)
    assert made.step >= 1
    assert all(torch.equal(a, b) for a, b in zip(made.parameters, reference.parameters, strict=True))


WORKER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from conftest import tokenizer
from test_optimizer import lbfgs, losses
made = lbfgs(tokenizer.__wrapped__())
made.fit()
if made.is_main:
    print(json.dumps({"world": made.world, "losses": losses(made)}))
made.accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)  # see cli.leave
"""


def test_two_processes_search_alike_and_give_the_losses_of_one(tokenizer, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d",
               "--rdzv-endpoint=127.0.0.1:0", str(script), here]
    paths = [here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    one = lbfgs(tokenizer)
    one.fit()
    assert two["world"] == 2
    assert two["losses"][:4] == pytest.approx(losses(one)[:4], rel=1e-3)  # a search grows what rounding leaves


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("written", ["L-BFGS", "l_bfgs", "LBFGS", "lbfgs"])
def test_names_are_taken_as_people_write_them(written):
    assert settings(optimizer=written, learning_rate=1).training.optimizer == "lbfgs"


@pytest.mark.parametrize("method, values, message", [
    ("lora", {"optimizer": "lbfgs", "weight_decay": 0.1},
     "training.weight_decay goes with an optimizer that knows decay, unlike lbfgs and rprop, and would do nothing here."),
    ({"name": "lora", "plus_ratio": 16}, {"optimizer": "lbfgs"},
     "training.optimizer=lbfgs has one learning rate for all weights, and method.plus_ratio wants two."),
    ("lora", {"optimizer": "sgd", "adam_beta1": 0.8}, "training.adam_beta1 goes with an optimizer of Adam's kind, and would do nothing here."),
    ("lora", {"optimizer": "lion_8bit", "adam_epsilon": 1e-6}, "training.adam_epsilon goes with an optimizer of Adam's kind"),
    ("lora", {"optimizer": "rprop", "scheduler": "cosine"}, "training.scheduler goes with an optimizer other than rprop"),
    ("lora", {"optimizer": "lbfgs", "warmup": 0.1}, "training.warmup=0.1 begins with a learning rate of 0, and lbfgs goes on from how long"),
    ("full", {"optimizer": "sgd", "learning_rate": None},
     "training.optimizer=sgd needs training.learning_rate: the default of method=full was found for Adam, and sgd's is a factor of the gradient"),
])
def test_settings_that_an_optimizer_cannot_keep_are_refused(method, values, message):
    with pytest.raises(SettingError) as caught:
        settings(method, **{"learning_rate": 1.0} | values)
    assert message in str(caught.value)


def test_lbfgs_beside_new_tokens_that_learn_at_a_rate_of_their_own_is_refused():
    values = {"data": "x", "tokens": {"add": ["<a>"]}, "training": {"optimizer": "lbfgs", "learning_rate": 1}}
    with pytest.raises(SettingError, match="tokens.add beside method=prefix wants two"):
        config.parse(values | {"method": "prefix"})
    assert config.parse(values)  # lora: their rate is its own


@pytest.mark.parametrize("name", ["adamw", "adam", "adamw_torch_fused", "ademamix_8bit", "lion_8bit", "paged_adamw_8bit"])
def test_adams_settings_go_with_its_kind(name):
    assert settings(optimizer=name, adam_beta1=0.8, adam_beta2=0.99).training.adam_beta1 == 0.8


@pytest.mark.parametrize("name, options, message", [
    ("sgd", "momentun=0.9", "sgd has no option 'momentun'. Did you mean 'momentum'?\nExpected some of momentum, dampening, nesterov, foreach, fused."),
    ("lbfgs", "weight_decay=1", "lbfgs has no option 'weight_decay'.\nExpected some of max_iter, max_eval, tolerance_grad, tolerance_change, "
                                "history_size, line_search_fn."),
    ("adam", "eps=1e-6", "adam has no option 'eps'. It is training.adam_epsilon."),
    ("adagrad", "lr=1", "adagrad has no option 'lr'. It is training.learning_rate."),
    ("lbfgs", "max_iter=2.5", "max_iter = 2.5: Input should be a valid integer"),
    ("lbfgs", "history_size=0", "history_size = 0: Input should be greater than 0."),
    ("lbfgs", "line_search_fn=wolfe", "line_search_fn = wolfe: Input should be 'strong_wolfe'."),
    ("sgd", "momentum=-1", "sgd refuses them: Invalid momentum value: -1"),
    ("sgd", "nesterov=true", "sgd refuses them: Nesterov momentum requires a momentum and zero dampening"),
    ("sgd", "momentum", "training.optimizer_options = 'momentum' cannot be read."),
])
def test_options_are_refused_by_name_before_anything_is_loaded(name, options, message):
    with pytest.raises(SettingError) as caught:
        refuse_unfit(settings(optimizer=name, optimizer_options=options, learning_rate=1).training, torch.float32)
    assert message in str(caught.value)


def test_options_reach_the_optimizer_as_yaml_reads_them():
    made = make_optimizer(torch.nn.Linear(2, 2), settings(optimizer="rprop", learning_rate=0.1, optimizer_options="etas=[0.4, 1.1],foreach=false").training, 0.1)
    assert (made.defaults["etas"], made.defaults["foreach"], made.defaults["lr"]) == ((0.4, 1.1), False, 0.1)
    made = make_optimizer(torch.nn.Linear(2, 2), settings(adam_beta2=0.95, optimizer_options="amsgrad=yes", weight_decay=0.1).training, 0.1)
    assert made.defaults["betas"] == (0.9, 0.95) and made.defaults["amsgrad"] is True
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]


def test_lbfgs_is_refused_where_the_loss_is_scaled():
    training = settings(optimizer="lbfgs", learning_rate=1).training
    with pytest.raises(SettingError, match="this run computes in fp16"):
        refuse_unfit(training, torch.float16)
    refuse_unfit(training, torch.bfloat16)


def test_adam_is_one_kernel_but_not_under_loss_scaling():
    assert takes_fused("cuda:0", loss_scaled=False) and takes_fused("cpu", loss_scaled=False)
    assert not takes_fused("cuda", loss_scaled=True) and not takes_fused("cpu", loss_scaled=True)

    def made(fused, **words):
        return make_optimizer(torch.nn.Linear(2, 2), settings(learning_rate=0.1, **words).training, 0.1, fused=fused).defaults["fused"]

    assert made(True) is True and made(False) is None
    assert made(True, optimizer_options="foreach=true") is None and made(True, optimizer_options="fused=false") is False
    assert made(True, optimizer="sgd") is None


def test_the_fused_step_is_the_plain_one():
    steps = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 4)
        optimizer = make_optimizer(layer, settings(learning_rate=0.1, weight_decay=0.1).training, 0.1, fused=fused)
        for _ in range(3):
            layer(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        steps.append(layer.weight.detach())
    assert (steps[0] - steps[1]).abs().max() < 1e-6

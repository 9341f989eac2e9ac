"""The callback in the stock Trainer, against the filter driven by hand."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_kalman import GKAConfig, GKAForCausalLM
from hf_kalman.training import KalmanCallback, KalmanOptimizer, sampled_label_loss

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXACT = {"variance": 1e-3, "decay": 0.0, "max_step": None, "temper": 1.0}


def language_model(kind="llama"):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else GKAForCausalLM(GKAConfig(**SIZES))


def rows(count=16, length=12):
    """Rows of tokens; some labels of some rows are left out, so that means differ in what they are over."""
    ids = torch.randint(0, 31, (count, length), generator=torch.Generator().manual_seed(1))
    found = []
    for index, row in enumerate(ids):
        labels = row.clone()
        labels[: index % 5] = -100
        found.append({"input_ids": row, "labels": labels})
    return found


def arguments(folder, **options):
    own = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no"}
    more = {"max_grad_norm": 0.0, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3}
    return TrainingArguments(str(folder), **{**own, **more, **options})


def train(model, folder, callback, data=None, resume=None, others=(), **options):
    trainer = Trainer(model, arguments(folder, **options), train_dataset=data or rows(), callbacks=[*others, callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["llama", "gka"])
@pytest.mark.parametrize("structure", ["diagonal", "block"])
def test_a_run_is_the_filter_driven_by_hand(tmp_path, kind, structure):
    model = language_model(kind)
    expected, seen = copy.deepcopy(model), []
    model.register_forward_pre_hook(lambda m, a, k: seen.append((k["input_ids"], k["labels"])), with_kwargs=True)
    callback = KalmanCallback(structure=structure, process_noise=1e-6, **EXACT)
    trainer = train(model, tmp_path, callback)
    optimizer = KalmanOptimizer(expected.parameters(), 1e-3, structure=structure, process_noise=1e-6)
    losses = []
    for step, (ids, labels) in enumerate(seen):
        wanted = F.pad(labels[:, 1:], (0, 1), value=-100)
        draws = [np.random.Generator(np.random.Philox([3, step, row])).random(12) for row in range(4)]
        counts = (wanted != -100).sum(1).tolist()
        uniforms = torch.tensor(np.concatenate([d[:c] for d, c in zip(draws, counts, strict=True)])).float()
        logits = expected(ids).logits
        sampled_label_loss(logits, wanted, uniforms=uniforms).backward(retain_graph=True)
        optimizer.accumulate_fisher()
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / sum(counts))
    torch.testing.assert_close(parameters(model), parameters(expected), rtol=2e-5, atol=2e-6)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose([entry["kalman_prequential_loss"] for entry in logs], losses, rtol=1e-5)
    assert {p: v.mean().item() for p, v in optimizer.variances().items()}  # The filter by hand has beliefs.
    ratio = sum(v.sum() for v in optimizer.variances().values()) / (1e-3 * sum(p.numel() for p in model.parameters()))
    assert logs[-1]["kalman_variance_ratio"] == pytest.approx(ratio.item(), rel=1e-4)
    assert logs[-1]["kalman_variance_min"] > 0 and logs[-1]["learning_rate"] == 1.0


@pytest.mark.parametrize(("batch", "accumulated"), [(4, 2), (2, 4), (1, 8)])
def test_accumulated_batches_are_one_batch(tmp_path, batch, accumulated):
    whole, parts = language_model(), language_model()
    train(whole, tmp_path / "a", KalmanCallback(**EXACT), per_device_train_batch_size=8)
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    train(parts, tmp_path / "b", KalmanCallback(**EXACT), **options)
    torch.testing.assert_close(parameters(parts), parameters(whole), rtol=2e-5, atol=2e-6)


TWO = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_kalman_callback import EXACT, KalmanCallback, classifier, classified, language_model, parameters, rows, train
kind, work = sys.argv[1:]
text = kind == "text"
model = language_model() if text else classifier()
callback = KalmanCallback(**EXACT, structure="block")
trainer = train(model, work, callback, data=rows() if text else classified(), per_device_train_batch_size=2)
if trainer.is_world_process_zero():
    torch.save((parameters(model), trainer.state.log_history[0]), work + ".pt")
"""


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_two_processes_take_the_step_of_one(tmp_path, kind):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(folder=str(Path(__file__).parent)))
    model = language_model() if kind == "text" else classifier()
    data = rows() if kind == "text" else classified()
    trainer = train(model, tmp_path / "one", KalmanCallback(**EXACT, structure="block"), data=data)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, script, kind, tmp_path / "both"], check=True, env=environment, capture_output=True)
    found, log = torch.load(tmp_path / "both.pt", weights_only=True)
    torch.testing.assert_close(found, parameters(model), rtol=2e-5, atol=2e-6)
    names = [name for name in log if name.startswith("kalman")]
    assert [log[n] for n in names] == pytest.approx([trainer.state.log_history[0][n] for n in names], rel=1e-4)


def classifier():
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def classified(count=16):
    ids = torch.randint(0, 31, (count, 6), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": (row[0] % 3).long()} for row in ids]


def test_classes_are_learned_in_one_pass(tmp_path):
    model, data = classifier(), classified(400)
    options = {"decay": 1e-3, "temper": "auto"}
    trainer = train(model, tmp_path, KalmanCallback(3e-2, structure="block", **options), data=data)
    losses = [e["kalman_prequential_loss"] for e in trainer.state.log_history if "loss" in e]
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:10])
    assert all(e["kalman_temper"] == 1.0 for e in trainer.state.log_history if "loss" in e)


@pytest.mark.parametrize("structure", ["diagonal", "low_rank"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, structure):
    options = {"structure": structure, "rank": 3, "process_noise": 1e-6, "temper": 2.0}
    saving = {"save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 2}
    whole = language_model()
    first = train(whole, tmp_path / "a", KalmanCallback(**options), **saving)
    again = language_model()
    resumed = train(again, tmp_path / "b", KalmanCallback(**options), resume=tmp_path / "a" / "checkpoint-4", **saving)
    assert torch.equal(parameters(again), parameters(whole))
    a, b = (t.state.log_history[-2] for t in (first, resumed))
    assert {n: a[n] for n in a if n.startswith("kalman")} == {n: b[n] for n in b if n.startswith("kalman")}
    with pytest.raises(ValueError, match="filter has structure .* resume with the arguments"):
        train(
            language_model(), tmp_path / "c", KalmanCallback(structure="full"), resume=tmp_path / "a" / "checkpoint-4"
        )


def test_a_checkpoint_without_a_filter_is_refused(tmp_path):
    trainer = Trainer(language_model(), arguments(tmp_path, save_strategy="epoch"), train_dataset=rows())
    trainer.train()
    with pytest.raises(ValueError, match="the checkpoint of step 4 holds no filter"):
        train(language_model(), tmp_path, KalmanCallback(), resume=tmp_path / "checkpoint-4", num_train_epochs=2)


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_reporters_see_the_figures_and_the_trainer_gets_its_optimizer_back(tmp_path):
    reporter, model = Reporter(), language_model()
    callback = KalmanCallback()
    trainer = train(model, tmp_path, callback, others=[reporter])
    assert len(reporter.logs) == 5 and all("kalman_nis" in logs for logs in reporter.logs[:4])
    assert "step" not in vars(callback.inner) and not model._forward_hooks
    assert not callback.inner.state
    before = parameters(model)
    trainer.remove_callback(callback)
    trainer.train()
    assert not torch.equal(before, parameters(model)) and trainer.optimizer.optimizer.state


def test_a_callback_can_be_used_again_after_a_run_that_broke_off(tmp_path):
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("broken off")

    callback, model, fresh = KalmanCallback(**EXACT), language_model(), language_model()
    with pytest.raises(RuntimeError, match="broken off"):
        train(language_model(), tmp_path, callback, others=[Broken()])
    with pytest.raises(RuntimeError, match="broken off"):
        train(model, tmp_path, callback, others=[Broken()])
    model.load_state_dict(fresh.state_dict())
    train(model, tmp_path, callback)
    train(fresh, tmp_path, KalmanCallback(**EXACT))
    assert torch.equal(parameters(model), parameters(fresh)) and not model._forward_hooks


@pytest.mark.parametrize(("checkpointing", "bf16"), [(False, False), (True, False), (True, True)])
def test_adapters_of_peft(tmp_path, checkpointing, bf16):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(language_model(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    callback = KalmanCallback(1e-2, structure="block", overrides={"lora_A": {"variance": 1e-3}})
    same = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(1)] * 120
    trainer = train(model, tmp_path, callback, data=same, gradient_checkpointing=checkpointing, bf16=bf16)
    losses = [e["kalman_prequential_loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.08  # Only adapters of a random model move.
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    priors = {b.prior_variance for p, b in callback.optimizer.beliefs.items()}
    assert priors == {1e-2, 1e-3}


def test_rare_factors_count_as_often_as_frequent_ones(tmp_path):
    """The expected information is the same: traces of the precision agree to sampling error."""
    traces = []
    for every in (1, 4):
        options = {"decay": 0.0, "temper": 1.0, "max_step": 1e-9, "fisher_every": every}
        model, callback = language_model(), KalmanCallback(10.0, **options)
        train(model, tmp_path, callback, data=rows(64) * 8, logging_steps=500)
        traces.append(sum((b.precision - 0.1).double().sum().item() for b in callback.optimizer.beliefs.values()))
    assert traces[1] == pytest.approx(traces[0], rel=0.2)


def test_variances_rise_at_an_alarm(tmp_path):
    model = language_model()
    steady = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(4)] * 30
    callback = KalmanCallback(1e-6, process_noise=0.0, drift_boost=100.0)
    alarm_at, update = 20, callback.drift.update
    callback.drift.update = lambda value: update(value) and False or callback.steps == alarm_at
    trainer = train(model, tmp_path, callback, data=steady)
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["kalman_drift_alarms"] for e in logs] == [int(step >= alarm_at) for step in range(30)]
    assert logs[alarm_at]["kalman_variance_ratio"] > 50 * logs[alarm_at - 1]["kalman_variance_ratio"]


def test_the_gate_weakens_surprising_steps(tmp_path):
    """Labels at the far end of what the model thinks possible: information and step of an outlier shrink."""
    data, lengths = [{"input_ids": torch.arange(12), "labels": torch.arange(12)}] * 4, []
    model = language_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    for gate in (None, 0.999):
        trainer = train(copy.deepcopy(model), tmp_path, KalmanCallback(temper=1.0, gate=gate, max_step=None), data=data)
        lengths.append(trainer.state.log_history[0])
    free, gated = lengths
    assert free["kalman_nis"] == gated["kalman_nis"] > 10.83
    assert gated["kalman_temper"] == pytest.approx(free["kalman_nis"] / 10.8276, rel=1e-3)
    assert gated["kalman_step_length"] < free["kalman_step_length"]


@pytest.mark.parametrize("gate", [None, 0.5])
def test_the_noise_follows_the_temper_and_not_the_gate(tmp_path, gate):
    callback = KalmanCallback(step_size=2e-3, temper=3.0, gate=gate, overrides={"norm": {"process_noise": 1e-9}})
    train(language_model(), tmp_path, callback)
    assert [group["process_noise"] for group in callback.optimizer.param_groups] == pytest.approx([12e-6, 1e-9])
    callback = KalmanCallback(process_noise=5e-7, temper=3.0)
    train(language_model(), tmp_path, callback)
    assert callback.optimizer.param_groups[0]["process_noise"] == 5e-7


def test_a_run_that_diverges_says_so(tmp_path):
    model = language_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="loss must be finite, got nan: the run has diverged"):
        train(model, tmp_path, KalmanCallback())


def test_a_schedule_scales_the_gain_only_where_it_is_asked_for(tmp_path):
    for schedule, wanted in ((False, [1.0] * 4), (True, [1.0, 0.75, 0.5, 0.25])):
        trainer = train(language_model(), tmp_path, KalmanCallback(schedule=schedule))
        assert [e["learning_rate"] for e in trainer.state.log_history if "loss" in e] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, "`max_grad_norm` of TrainingArguments must be 0.* got 1.0"),
        ({"weight_decay": 0.1}, "`weight_decay` of TrainingArguments must be 0.* got 0.1"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
        ({"torch_compile": True}, "`torch_compile`"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "`use_reentrant`",
        ),
    ],
)
def test_arguments_that_break_the_filter_are_refused(tmp_path, options, message):
    model = language_model()
    before = parameters(model)
    with pytest.raises(ValueError, match=message):
        train(model, tmp_path, KalmanCallback(), **options)
    assert torch.equal(before, parameters(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temper": 0.5}, '`temper` must be "auto" or >= 1, got 0.5'),
        ({"temper": "tokens"}, "`temper` must be .* got 'tokens'"),
        ({"step_size": 0.0}, "`step_size` must be > 0, got 0.0"),
        ({"drift_boost": 0.5}, "`drift_boost` must be >= 1, got 0.5"),
        ({"fisher_every": 0}, "`fisher_every` must be >= 1, got 0"),
        ({"gate": 1.0}, "`gate` must be in \\(0, 1\\) or None, got 1.0"),
        ({"variance": -1.0}, "`variance` must be > 0, got -1.0"),
        ({"structure": "dense"}, "`structure` must be one of"),
    ],
)
def test_arguments_of_the_callback_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        KalmanCallback(**options)


def test_losses_that_are_no_mean_are_refused(tmp_path):
    model = language_model()
    inner = model.loss_function
    model.loss_function = lambda *args, **kwargs: 0.5 * inner(*args, **kwargs)
    with pytest.raises(ValueError, match="loss must be the mean cross-entropy"):
        train(model, tmp_path, KalmanCallback())
    with pytest.raises(ValueError, match="must be given `labels`"):
        callback = KalmanCallback()
        train(language_model(), tmp_path, callback, data=[{"input_ids": torch.arange(5)}] * 4)
    regression = BertForSequenceClassification(BertConfig.from_dict({**classifier().config.to_dict(), "num_labels": 1}))
    data = [{"input_ids": row["input_ids"], "labels": row["labels"].float()} for row in classified()]
    with pytest.raises(ValueError, match="one class label per row"):
        train(regression, tmp_path, KalmanCallback(), data=data)

"""The filter's belief saved beside the weights."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_kalman.training import KalmanCallback, KalmanOptimizer, load_posterior, save_posterior
from hf_kalman.training.posterior import POSTERIOR_FILE


def drive(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.accumulate_fisher()
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def build(structure="diagonal", variance=0.1, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
    options = {"structure": structure, "rank": 3, "process_noise": 1e-4, "prior_steps": 2}
    return model, KalmanOptimizer(model.parameters(), variance, **options)


@pytest.mark.parametrize("variance", [0.1, None])
@pytest.mark.parametrize("structure", ["diagonal", "block", "kronecker", "low_rank", "full"])
def test_a_filter_goes_on_elsewhere_bit_for_bit(structure, variance, tmp_path):
    model, optimizer = build(structure, variance)
    drive(model, optimizer, 7, 1)
    save_posterior(optimizer, model, tmp_path)
    other, fresh = build(structure, variance)
    other.load_state_dict(model.state_dict())
    load_posterior(fresh, other, tmp_path)
    drive(model, optimizer, 5, 2)
    drive(other, fresh, 5, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_narrow_parameters_keep_their_wide_means(tmp_path):
    model, optimizer = build(dtype=torch.bfloat16)
    drive(model, optimizer, 7, 1)
    save_posterior(optimizer, model, tmp_path)
    other, fresh = build(dtype=torch.bfloat16)
    other.load_state_dict(model.state_dict())
    load_posterior(fresh, other, tmp_path)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["mean"], fresh.state[b]["mean"])


def test_what_does_not_fit_is_refused_and_nothing_changed(tmp_path):
    model, optimizer = build()
    with pytest.raises(FileNotFoundError, match="folder"):
        load_posterior(optimizer, model, tmp_path)
    with pytest.raises(ValueError, match="give the model"):
        save_posterior(optimizer, nn.Linear(2, 2), tmp_path)
    save_posterior(optimizer, model, tmp_path)
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict()["state"][0].items()}
    _, blocks = build("block")
    with pytest.raises(ValueError, match="structure 'diagonal'"):
        load_posterior(blocks, _, tmp_path)
    larger = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="another shape"):
        load_posterior(KalmanOptimizer(larger.parameters(), 0.1), larger, tmp_path)
    named = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="other parameters"):
        load_posterior(KalmanOptimizer(named.parameters(), 0.1), named, tmp_path)
    file = tmp_path / POSTERIOR_FILE
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        load_posterior(optimizer, model, tmp_path)
    assert all(torch.equal(v, optimizer.state_dict()["state"][0][k]) for k, v in before.items())


def test_the_callback_begins_with_a_posterior(tmp_path):
    from tiny import tiny_model, tokens

    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]

    def run(model, name, posterior=None):
        callback = KalmanCallback(variance=1e-3, posterior=posterior)
        arguments = TrainingArguments(
            tmp_path / name,
            per_device_train_batch_size=2,
            max_steps=2,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        return callback.optimizer

    model = tiny_model()
    first = run(model, "a")
    (tmp_path / "kept").mkdir()
    save_posterior(first, model, tmp_path / "kept")
    second = run(model, "b", tmp_path / "kept")
    without = run(model, "c")
    variances = [sum(v.sum().item() for v in o.variances().values()) for o in (first, second, without)]
    assert variances[1] < variances[0] and variances[1] < variances[2]

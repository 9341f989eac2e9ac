"""The harness of the synthetic tasks: it trains what it says, resumes, and tells of what failed."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import run as tasks
import torch
from registry import MODELS, Cell, Size, build
from run import Study, Task
from runner import Training, packed, run_all, run_cells, together
from sequences import Examples, Mad, Recall, Word

from hf_kalman import GKAConfig, GKAModel, KLAConfig, KLAModel

TASK = Recall(32, 4, vocabulary=32, mixed=True)
SIZE = Size(width=32, head=16, batch=16, steps=40, rates=(1e-2, 1e-3), seeds=2)
CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["attention", "gka", "kla"])
def test_models_are_causal_and_start_from_their_seed(model):
    cell = Cell(model, "recall", SIZE)
    net = build(cell, TASK, 0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), build(cell, TASK, 0).parameters(), strict=True))
    assert not torch.equal(net.embedding.weight, build(cell, TASK, 1).embedding.weight)
    tokens = torch.randint(32, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = torch.randint(32, (2, 8))
    with torch.no_grad():
        a, b = net(tokens), net(changed)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:], b[:, 12:])


def test_a_constant_ridge_takes_the_place_of_the_adaptive_one(monkeypatch):
    def dense(query, key, value, log_decay, gate, ridge, max_CG_iteration):  # noqa: N803 (the library's name)
        assert not log_decay.any() and (gate == 1).all() and max_CG_iteration == 30
        gram = torch.einsum("bthi,bthj->bthij", key, key).cumsum(1) + torch.diag_embed(ridge)
        state = torch.einsum("bthi,bthj->bthij", value, key).cumsum(1)
        return (state @ torch.linalg.solve(gram, query[..., None]))[..., 0], None

    for name in ("fla", "fla.ops", "fla.ops.mesa_net"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(chunk_mesa_net=dense))
    tokens = torch.randint(32, (2, 20))

    def logits(**fields):
        size = replace(SIZE, fields=tasks.BARE["gka"] | {"rms_norm_eps": 1e-20} | fields)
        with torch.no_grad():
            return build(Cell("gka", "recall", size), TASK, 0)(tokens)

    # A ridge far above every eigenvalue is no solve at all, up to a factor that the norm behind it takes away.
    assert torch.allclose(logits(constant_ridge=1e3), logits(solver_iterations=0), atol=1e-3, rtol=1e-2)
    assert not torch.allclose(logits(constant_ridge=0.1), logits(solver_iterations=0), atol=1e-3, rtol=1e-2)
    with pytest.raises(ValueError, match="without gates"):
        logits(constant_ridge=0.1, use_decay=True)


@pytest.mark.parametrize(("name", "config", "model"), [("gka", GKAConfig, GKAModel), ("kla", KLAConfig, KLAModel)])
def test_our_mixers_start_as_the_package_starts_them(name, config, model):
    fields = {"linear_state_size": 4} if name == "kla" else {"output_initializer_factor": 0.3}
    net = build(Cell(name, "recall", Size(width=32, head=16, layers=1, fields=fields)), TASK, 3)
    torch.manual_seed(3)
    whole = model(
        config(
            vocab_size=8,
            hidden_size=32,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_dim=16,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            **fields,
        )
    )
    wanted = whole.layers[0].mixer.state_dict()
    found = net.blocks[0].mixer.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_outputs_of_mixers_start_as_wide_as_asked_for():
    cells = [Cell("kla", "recall", Size(width=32, head=16, layers=2, mlp=8, outputs=f)) for f in (1.0, 0.1)]
    wide, narrow = (build(cell, TASK, 3).state_dict() for cell in cells)
    scaled = {name for name in wide if not torch.equal(wide[name], narrow[name])}
    assert scaled == {f"blocks.{n}.mixer.o_proj.weight" for n in range(2)}
    assert all(torch.equal(0.1 * wide[name], narrow[name]) for name in scaled)


def test_compression_reads_the_last_state_alone():
    task = Mad("compress")
    net = build(Cell("attention", "compress", SIZE), task, 0)
    tokens, targets, _ = task.draw(4, 0)
    assert net(tokens).shape == (4, 32, 17) and targets.shape == (4, 32)
    with torch.no_grad():
        wanted = net(tokens)

        def only_the_last(module, inputs, output):
            return torch.cat([torch.zeros_like(output[:, :-1]), output[:, -1:]], 1)

        net.norm.register_forward_hook(only_the_last)
        assert torch.equal(net(tokens), wanted)


def test_steps_are_those_of_a_plain_loop():
    cell, data = Cell("attention", "recall", SIZE), packed(TASK.draw(64, 0))
    first, second = (Training(cell, TASK, data, 1e-2, 0) for _ in range(2))
    for _ in range(5):
        first.advance()
        second.advance()
    assert first.counter == 5
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    # Batches follow the seed's order and begin again at its end.
    rows = [(torch.tensor(step) * 16 + first.offsets) % 64 for step in range(5)]
    assert torch.equal(rows[0], rows[4]) and not torch.equal(rows[0], rows[1])


def test_a_cell_learns_and_reports_every_seed_at_the_best_rate():
    easy = Task(Recall(16, 2, vocabulary=16), {"2": Recall(16, 2, vocabulary=16)})
    size = Size(width=32, head=16, batch=32, steps=150, rates=(1e-2, 1e-6), seeds=2)
    cell = Cell("attention", "recall", size)
    (result,) = run_cells([cell], CPU, Study((cell,), {"recall": easy}, 2048, 64)).values()
    assert result["rate"] == 1e-2 and [run["seed"] for run in result["runs"]] == [0, 1]
    assert all(run["tests"]["2"] > 0.4 for run in result["runs"])
    assert all(accuracy < 0.3 for _, accuracy, _ in result["rates"][1e-6])
    json.dumps(result)


def test_accuracy_by_position_and_early_end():
    task = Word("A5", 4)
    cell = Cell("attention", "A5", Size(width=32, head=16, mlp=16, batch=8, steps=30))
    training = Training(cell, task, packed(task.draw(64, 0)), 1e-3, 0)
    by_position = training.accuracy(task.draw(128, 1), by_position=True)
    whole = training.accuracy(task.draw(128, 1))
    assert len(by_position) == 4 and sum(by_position) / 4 == pytest.approx(whole, abs=1e-3)
    examples = Examples(torch.zeros(8, 4, dtype=torch.int64), torch.zeros(8, 4, dtype=torch.int64))
    constant = Training(cell, task, packed(examples), 1e-2, 0)
    together([constant], 30, examples, 5)
    assert constant.curve[-1][1] == 1.0 and constant.curve[-1][0] < 30


def test_a_pack_trains_each_cell_as_alone_and_outlives_a_broken_one():
    easy = Task(Recall(16, 2, vocabulary=16), {"2": Recall(16, 2, vocabulary=16)})
    size = Size(width=16, head=16, batch=8, steps=6, rates=(1e-2,), seeds=2)
    cells = [Cell(model, "recall", size) for model in ("attention", "broken", "gka")]
    study = Study(tuple(cells), {"recall": easy}, 64, 32)
    found = run_cells(cells, CPU, study)
    assert list(found) == ["broken/recall/16x2", "attention/recall/16x2", "gka/recall/16x2"]
    assert "KeyError" in found["broken/recall/16x2"]["failed"]
    (alone,) = run_cells(cells[2:], CPU, study).values()
    assert found["gka/recall/16x2"]["runs"] == alone["runs"]


def test_iterations_at_inference_are_those_asked_for():
    easy = Task(Recall(16, 2, vocabulary=16), {"2": Recall(16, 2, vocabulary=16)})
    size = Size(width=16, head=16, batch=32, steps=60, rates=(1e-2,), seeds=1, fields={"solver_iterations": 5})
    cell = Cell("gka", "recall", size)
    (found,) = run_cells([cell], CPU, Study((cell,), {"recall": easy}, 256, 256, (0, 5))).values()
    (run,) = found["runs"]
    assert run["at_inference"][5] == run["tests"] != run["at_inference"][0]


def test_packs_hold_cells_of_one_task():
    cells = [Cell("gka", task, Size(width=width)) for width in (16, 32, 64) for task in ("a", "b")]
    found = [[(cell.task, cell.size.width) for cell in pack] for pack in tasks.packs(cells, 2)]
    assert found == [[("a", 16), ("a", 32)], [("a", 64)], [("b", 16), ("b", 32)], [("b", 64)]]
    # What trains side by side takes as many steps.
    steps = [Cell("gka", "a", Size(steps=number), str(i)) for i, number in enumerate((5, 7, 5))]
    assert [[cell.size.steps for cell in pack] for pack in tasks.packs(steps, 3)] == [[5, 5], [7]]


def test_a_cell_can_be_kept_from_half_precision():
    task, dtypes = Word("A5", 4), []
    for autocast in (True, False):
        cell = Cell("kla", "A5", Size(width=16, head=16, mlp=16, batch=4, steps=2, autocast=autocast))
        training = Training(cell, task, packed(task.draw(8, 0)), 1e-3, 0)
        training.model.head.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
        training.advance()
        training.accuracy(task.draw(8, 1))
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_word_problems_are_tested_on_longer_words():
    task = tasks.tracked("S5", 8)
    assert task.training.length == task.tests["whole"].length == 8 < task.tests["longer"].length == tasks.LONGER


def double(job, device):
    if job < 0:
        raise ValueError("negative")
    return {"value": 2 * job, "device": str(device)}


def test_jobs_are_spread_and_failures_are_told():
    found = {}
    run_all({"a": 1, "b": -1, "c": 3}, double, ["cpu"], 2, 60, found.__setitem__)
    assert found["a"]["value"] == 2 and found["c"]["value"] == 6 and "negative" in found["b"]["failed"]
    found.clear()
    run_all({"a": 1}, double, ["cpu"], 1, -1, found.__setitem__)
    assert found == {}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        f"import os, sys, time\nsys.path[:0] = {sys.path!r}\nfrom runner import run_all\n"
        "def work(job, device):\n    open(job, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
        f"if __name__ == '__main__':\n    run_all({{0: {str(tmp_path / 'number')!r}}}, work, ['cpu'], 1, 600, print)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        worker = int(within(60, lambda: (tmp_path / "number").exists() and (tmp_path / "number").read_text()))
    finally:
        parent.kill()
        parent.wait()
    assert within(20, lambda: not Path(f"/proc/{worker}").exists() or "State:\tZ" in status(worker))


def status(number):
    return Path(f"/proc/{number}/status").read_text()


def within(seconds, found):
    """What `found` gives as soon as it is something."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        if value := found():
            return value
        time.sleep(0.1)
    return None


def test_a_study_goes_on_and_forgets_what_other_settings_gave(tmp_path, monkeypatch, capsys):
    def small():
        """Two easy cells."""
        cells = tuple(
            Cell(m, "mqar", Size(width=16, head=16, batch=4, steps=2, rates=(1e-3,), seeds=1)) for m in ("attention",)
        )
        return Study(cells, {"mqar": Task(TASK, {"4": TASK})}, 16, 8)

    monkeypatch.setitem(tasks.STUDIES, "mqar", small)

    class Options:
        output, models, only, pack, beside = tmp_path, None, [""], 2, 3

    Options.only = ["another"]
    tasks.run_study("mqar", Options, ["cpu"], 1, 100)
    assert not (tmp_path / "tasks_mqar.json").exists() and "it has attention/mqar/16x2" in capsys.readouterr().out
    Options.only = ["other", "attention/mqar/16"]
    tasks.run_study("mqar", Options, ["cpu"], 1, 100)
    first = json.loads((tmp_path / "tasks_mqar.json").read_text())
    assert "runs" in first["cells"]["attention/mqar/16x2"]
    assert first["cells"]["attention/mqar/16x2"]["processes"] == 4
    first["cells"]["attention/mqar/16x2"]["kept"] = True
    (tmp_path / "tasks_mqar.json").write_text(json.dumps(first))
    tasks.run_study("mqar", Options, ["cpu"], 1, 100)
    assert json.loads((tmp_path / "tasks_mqar.json").read_text())["cells"]["attention/mqar/16x2"]["kept"]
    first["study"]["steps"] = 3
    (tmp_path / "tasks_mqar.json").write_text(json.dumps(first))
    tasks.run_study("mqar", Options, ["cpu"], 1, 100)
    assert "kept" not in json.loads((tmp_path / "tasks_mqar.json").read_text())["cells"]["attention/mqar/16x2"]


def test_a_cell_is_put_together_from_its_rates(tmp_path, monkeypatch):
    size = Size(width=16, head=16, batch=8, steps=20, rates=(1e-2, 1e-6), seeds=2)
    cell = Cell("attention", "mqar", size)
    study = Study((cell,), {"mqar": Task(TASK, {"4": TASK})}, 64, 32)
    monkeypatch.setitem(tasks.STUDIES, "mqar", lambda: study)

    class Options:
        output, models, only, pack, beside = tmp_path, None, ["", "/"], 1, 0

    path, run_all = tmp_path / "tasks_mqar.json", tasks.run_all
    # The first time ends after one rate.
    monkeypatch.setattr(tasks, "run_all", lambda jobs, *rest: run_all(dict([list(jobs.items())[1]]), *rest))
    tasks.run_study("mqar", Options, ["cpu"], 1, 100)
    halfway = json.loads(path.read_text())
    assert halfway["cells"] == {} and list(halfway["parts"]) == ["attention/mqar/16x2 at 1e-06"]
    monkeypatch.setattr(tasks, "run_all", run_all)
    tasks.run_study("mqar", Options, ["cpu"], 1, 100)
    (row,), (whole,) = json.loads(path.read_text())["cells"].values(), run_cells([cell], CPU, study).values()
    assert json.loads(path.read_text())["parts"] == {}
    (part,) = halfway["parts"].values()
    assert row["rates"]["1e-06"] == part["rates"]["1e-06"] and row["seconds"] > part["seconds"]
    whole = json.loads(json.dumps(whole))
    assert {key: row[key] for key in whole if key != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}


@pytest.mark.parametrize("name", list(tasks.STUDIES))
def test_studies_name_models_and_tasks_that_exist(name):
    study = tasks.STUDIES[name]()
    assert len({cell.key for cell in study.cells}) == len(study.cells)
    assert {cell.task for cell in study.cells} <= study.tasks.keys()
    assert {cell.model for cell in study.cells} <= {*MODELS, "delta_product"}

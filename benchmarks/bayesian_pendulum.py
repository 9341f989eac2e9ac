"""A decision transformer that adapts to a shifted inverted pendulum, one demonstrated action at a time.

    python benchmarks/bayesian_pendulum.py      # needs gymnasium

Plant: Pendulum-v1 of gymnasium (torque at most 2 N m, 0.05 s a step), started within 0.06 rad and 0.1 rad/s of
upright; mass, length, the gain of the actuator and a viscous friction can change. Expert: the linear-quadratic
regulator of the plant as it is, with effort dear (a soft one: a controller that does not mind effort is robust
against all but a reversed actuator, as a first try with cheap effort showed), its torque rounded to one of 21 levels.
A decision transformer (2 layers of width 64, one-hot actions, windows of 8 steps) learns the expert of the nominal
plant from 400 episodes of 80 steps, a fifth of whose actions are random, and is frozen but for its last layer. Then
the plant has changed (`SHIFTS`), and demonstrations arrive: the last 8 steps and the expert's action, from such
episodes at random steps, 200 in all, each learned once. Success: with the model in control from a start that no
demonstration holds, the pendulum is within 0.1 rad in each of the last 20 of 80 steps; 40 starts. Wrong confidence:
mean probability of the chosen action where the expert would choose one more than two levels away. Every method's one
hyper-parameter is the best of its grid on two seeds of the moderate shift; 10 other seeds give the figures.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from record import RESULTS, drawing, environment, interval, write
from torch import nn

from hf_kalman.training import KalmanBayesianHead, LastLayerLaplace, WarmStart

LEVELS, WINDOW, STEPS, STARTS = 21, 8, 80, 40
EFFORT, RANDOM, ANGLE = 1.0, 0.2, 0.1
TORQUES = np.linspace(-2, 2, LEVELS)
NOMINAL = {"mass": 1.0, "length": 1.0, "gain": 1.0, "friction": 0.0}
SHIFTS = {
    "none": NOMINAL,
    "mild": {"mass": 1.1, "length": 1.0, "gain": 0.7, "friction": 0.1},
    "moderate": {"mass": 1.0, "length": 1.1, "gain": 0.45, "friction": 0.0},
    "severe": {"mass": 1.2, "length": 1.1, "gain": 0.45, "friction": 0.2},
    "reversed": {"mass": 1.0, "length": 1.0, "gain": -1.0, "friction": 0.0},
}
MARKS = (0, 10, 25, 50, 100, 200)
VARIANCES, RATES = (1e-3, 1e-2, 1e-1, 1.0, 10.0), (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def head(**options):
    return VARIANCES, lambda linear, value: KalmanBayesianHead.from_linear(linear, "direct", variance=value, **options)


def warm(memory, optimizer):
    def make(linear, value):
        return WarmStart(linear, memory, optimizer=optimizer, learning_rate=value)

    return RATES, make


METHODS = {
    "no adaptation": ((0.0,), lambda linear, value: KalmanBayesianHead.from_linear(linear, "direct", variance=0.0)),
    "Bayesian, full": head(covariance="full"),
    "Bayesian, shared": head(covariance="shared"),
    "Bayesian, diagonal": head(covariance="diagonal"),
    **{f"warm start, memory {m or 'all'}, {o}": warm(m, o) for m in (1, 10, 50, 100, None) for o in ("sgd", "adamw")},
    "Laplace, memory 10, adamw": (
        RATES,
        lambda linear, value: LastLayerLaplace(linear, 0.1, memory=10, optimizer="adamw", learning_rate=value),
    ),
}


class Plant:
    """Many pendulums at once, with the dynamics of gymnasium's Pendulum-v1 (checked against it in `check`)."""

    def __init__(self, count, seed, mass, length, gain, friction):
        generator = np.random.default_rng(seed)
        self.angle = generator.uniform(-0.06, 0.06, count)
        self.speed = generator.uniform(-0.1, 0.1, count)
        self.mass, self.length, self.gain, self.friction = mass, length, gain, friction

    def states(self):
        return np.stack([np.cos(self.angle), np.sin(self.angle), self.speed / 4], -1)

    def step(self, torque):
        """Reward of each, and the state after it."""
        torque = np.clip(torque, -2, 2)
        reward = -(self.angle**2 + 0.1 * self.speed**2 + 0.001 * torque**2)
        pull = 3 * 10.0 / (2 * self.length) * np.sin(self.angle)
        turn = 3 / (self.mass * self.length**2) * (self.gain * torque - self.friction * self.speed)
        self.speed = np.clip(self.speed + (pull + turn) * 0.05, -8, 8)
        self.angle = (self.angle + self.speed * 0.05 + np.pi) % (2 * np.pi) - np.pi
        return reward


def check():
    """The nominal plant is gymnasium's."""
    import gymnasium

    env = gymnasium.make("Pendulum-v1").unwrapped
    plant = Plant(1, 0, **NOMINAL)
    env.reset(seed=0)
    env.state = np.array([plant.angle[0], plant.speed[0]])
    for number in range(50):
        torque = 2 * np.sin(number)
        env.step(np.array([torque]))
        plant.step(np.array([torque]))
        found = (env.state[0] + np.pi) % (2 * np.pi) - np.pi
        assert abs(found - plant.angle[0]) < 1e-9 and abs(env.state[1] - plant.speed[0]) < 1e-9


def regulator(mass, length, gain, friction):
    """Gains of the linear-quadratic regulator around upright."""
    from scipy.linalg import solve_discrete_are

    turn = 3 / (mass * length**2)
    a = np.array([[1.0, 0.05], [0.0, 1.0]]) @ np.array([[1, 0], [15.0 / length * 0.05, 1 - turn * friction * 0.05]])
    b = np.array([[0.05], [1.0]]) * (turn * gain * 0.05)
    cost, effort = np.diag([1.0, 0.1]), np.array([[EFFORT]])
    solution = solve_discrete_are(a, b, cost, effort)
    return np.linalg.solve(effort + b.T @ solution @ b, b.T @ solution @ a)[0]


def expert(plant, gains):
    """Levels that the expert chooses."""
    torque = -(gains[0] * plant.angle + gains[1] * plant.speed)
    return np.abs(np.clip(torque, -2, 2)[:, None] - TORQUES).argmin(-1)


def episodes(count, seed, shift):
    """{states (N, T, 3), levels (N, T), rewards (N, T)} of the expert; a share RANDOM of its actions is drawn."""
    plant, gains, generator = Plant(count, seed, **shift), regulator(**shift), np.random.default_rng(seed + 1)
    states, chosen, rewards = [], [], []
    for _ in range(STEPS):
        states.append(plant.states())
        best = expert(plant, gains)
        taken = np.where(generator.random(count) < RANDOM, generator.integers(0, LEVELS, count), best)
        chosen.append((best, taken))
        rewards.append(plant.step(TORQUES[taken]))
    best, taken = (np.stack(part, 1) for part in zip(*chosen, strict=True))
    return np.stack(states, 1), best, taken, np.stack(rewards, 1)


def windows(data, count, seed):
    """Random windows as inputs of the transformer, and the expert's level at each step."""
    states, best, taken, rewards = data
    generator = np.random.default_rng(seed)
    rows, starts = generator.integers(0, len(states), count), generator.integers(0, STEPS - WINDOW + 1, count)
    index = starts[:, None] + np.arange(WINDOW)
    togo = np.cumsum(rewards[:, ::-1], 1)[:, ::-1]
    parts = [part[rows[:, None], index] for part in (states, taken, togo, best)]
    return batch(parts[0], parts[1], parts[2], index), torch.tensor(parts[3])


def batch(states, taken, togo, index):
    actions = nn.functional.one_hot(torch.tensor(np.maximum(taken, 0)), LEVELS).float()
    actions[torch.tensor(taken) < 0] = 0
    return {
        "states": torch.tensor(states, dtype=torch.float32),
        "actions": actions,
        "returns_to_go": torch.tensor(togo[..., None] / 10, dtype=torch.float32),
        "timesteps": torch.tensor(index),
        "attention_mask": torch.ones(states.shape[:2], dtype=torch.long),
    }


def pretrained(seed=0, steps=1500):
    """The transformer, trained on the nominal expert."""
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    torch.manual_seed(seed)
    config = DecisionTransformerConfig(
        state_dim=3,
        act_dim=LEVELS,
        hidden_size=64,
        max_ep_len=STEPS,
        n_layer=2,
        n_head=2,
        action_tanh=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = DecisionTransformerModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = episodes(400, seed, NOMINAL)
    for number in range(steps):
        inputs, levels = windows(data, 64, 1000 + number)
        loss = nn.functional.cross_entropy(model(**inputs).action_preds.flatten(0, 1), levels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), loss.item()


@torch.no_grad()
def read(model, inputs):
    """What goes into the last layer at the last state of each window."""
    found = []
    hook = model.predict_action[0].register_forward_hook(lambda module, args, out: found.append(args[0]))
    model(**inputs)
    hook.remove()
    return found[0][:, -1]


@torch.no_grad()
def controlled(model, learner, shift, seed):
    """Success rate, agreement with the expert, and wrong confidence, with the model in control."""
    plant, gains = Plant(STARTS, seed, **shift), regulator(**shift)
    states, taken = np.zeros((STARTS, 0, 3)), np.zeros((STARTS, 0), dtype=int)
    togo, inside, wrong, agree = np.zeros((STARTS, 0)), [], [], []
    left = np.full(STARTS, -1.0)
    for number in range(STEPS):
        states = np.concatenate([states, plant.states()[:, None]], 1)[:, -WINDOW:]
        taken = np.concatenate([taken, np.full((STARTS, 1), -1)], 1)[:, -WINDOW:]
        togo = np.concatenate([togo, left[:, None]], 1)[:, -WINDOW:]
        index = np.broadcast_to(np.arange(number + 1)[-WINDOW:], taken.shape).copy()
        p = learner(read(model, batch(states, taken, togo, index))).probabilities
        level, best = p.argmax(-1).numpy(), expert(plant, gains)
        far = np.abs(level - best) > 2
        wrong += p.max(-1).values.numpy()[far].tolist()
        agree.append(np.mean(~far))
        taken[:, -1] = level
        left = np.minimum(left - plant.step(TORQUES[level]), 0)
        if number >= STEPS - 20:
            inside.append(np.abs(plant.angle) < ANGLE)
    return {
        "success": float(np.mean(np.all(inside, 0))),
        "agreement": float(np.mean(agree)),
        "wrong_confidence": float(np.mean(wrong)) if wrong else None,
    }


WORKER = {}


def start(state, config):
    from transformers import DecisionTransformerModel

    torch.set_num_threads(1)
    WORKER["model"] = DecisionTransformerModel(config).eval()
    WORKER["model"].load_state_dict(state)


def run(task):
    method, value, shift, seed, marks = task
    model = WORKER["model"]
    demonstrations, levels = windows(episodes(20, 10_000 + seed, SHIFTS[shift]), MARKS[-1], seed)
    features, random_state = read(model, demonstrations), random.Random(seed)
    order = list(range(len(features)))
    random_state.shuffle(order)
    learner = METHODS[method][1](model.predict_action[0], value)
    along, seconds = {}, 0.0
    for number in range(MARKS[-1] + 1):
        if number in marks:
            along[number] = controlled(model, learner, SHIFTS[shift], 50_000 + seed)
        if number < MARKS[-1] and method != "no adaptation":
            started = time.perf_counter()
            learner.filter_step(features[order[number]], int(levels[order[number], -1]))
            seconds += time.perf_counter() - started
    row = {"method": method, "value": value, "shift": shift, "seed": seed, "along": along}
    print(json.dumps({**row, "along": {k: v["success"] for k, v in along.items()}}), flush=True)
    return {**row, "ms_per_sample": 1e3 * seconds / MARKS[-1]}


def summary(rows, seeds):
    found = []
    for method, shift in dict.fromkeys((row["method"], row["shift"]) for row in rows):
        own = [row for row in rows if (row["method"], row["shift"]) == (method, shift)]
        row = {"method": method, "shift": shift, "value": own[0]["value"], "seeds": seeds}
        row["ms_per_sample"] = round(statistics.mean(r["ms_per_sample"] for r in own), 3)
        for mark in MARKS:
            values = [r["along"][mark]["success"] for r in own]
            row[f"success_{mark}"] = round(statistics.mean(values), 4)
            row[f"success_{mark}_95"] = round(interval(values), 4)
        wrong = [w for r in own if (w := r["along"][MARKS[-1]]["wrong_confidence"]) is not None]
        row["wrong_confidence"] = round(statistics.mean(wrong), 4) if wrong else None
        row["agreement"] = round(statistics.mean(r["along"][MARKS[-1]]["agreement"] for r in own), 4)
        found.append(row)
    return found


def draw(result, folder):
    """Success rates over demonstrated actions, one panel for each shift."""
    rows = result["summary"]
    plt = drawing()
    if plt is None:
        return
    shifts = [shift for shift in SHIFTS if shift != "none"]
    figure, axes = plt.subplots(1, len(shifts), figsize=(4.4 * len(shifts), 3.6), sharey=True, layout="constrained")
    for axis, shift in zip(axes, shifts, strict=True):
        for row in (r for r in rows if r["shift"] == shift):
            if row["method"].endswith("sgd") or row["method"] == "Bayesian, shared":
                continue
            values, errors = ([row[f"success_{m}{end}"] for m in MARKS] for end in ("", "_95"))
            style = "-" if row["method"].startswith("Bayesian") else ":" if row["method"] == "no adaptation" else "--"
            axis.errorbar(range(len(MARKS)), values, errors, label=row["method"], linestyle=style, capsize=2)
        axis.set_xticks(range(len(MARKS)), MARKS)
        axis.set(title=shift, xlabel="demonstrated actions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success rate")
    axes[-1].legend(fontsize=6)
    figure.savefig(folder / "bayesian_pendulum.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    check()
    torch.set_num_threads(options.jobs)
    model, loss = pretrained()
    result = {"environment": environment(), "levels": LEVELS, "shifts": SHIFTS, "pretraining_loss": loss}
    print(json.dumps({"pretraining_loss": loss}), flush=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, start, (model.state_dict(), model.config)) as pool:
        last = (100, 200)
        searches = [(m, v, "moderate", s, last) for m, (grid, _) in METHODS.items() for v in grid for s in (0, 1)]
        result["search"] = pool.map(run, searches, chunksize=1)
        best = {}
        for method, (grid, _) in METHODS.items():

            def reached(value, method=method):
                own = [r for r in result["search"] if (r["method"], r["value"]) == (method, value)]
                return sum(
                    r["along"][mark]["success"] + 1e-3 * r["along"][mark]["agreement"] for r in own for mark in last
                )

            best[method] = max(grid, key=reached)
        tasks = [
            (method, best[method], shift, seed, MARKS)
            for method in METHODS
            for shift in SHIFTS
            for seed in range(2, options.seeds + 2)
        ]
        result["runs"] = pool.map(run, tasks, chunksize=1)
    result["summary"] = summary(result["runs"], options.seeds)
    write("bayesian_pendulum", result, options.output)
    draw(result, options.output)
    for row in result["summary"]:
        print(json.dumps({k: v for k, v in row.items() if not k.endswith("_95")}))


if __name__ == "__main__":
    main()

"""One pass over drifting dynamics: the Kalman world model against the same model and an MLP trained by gradients.

    python benchmarks/world_model.py --corpus FOLDER          # needs gymnasium

Tasks: Pendulum-v1 (length and mass change half-way), CartPole-v1 (length, mass, force), and the lengths of the
sentences of a text (Shakespeare, then Brown), by their last eight. Every observation is predicted before it is learned
from. The twins see the same stream: "equal data" takes one AdamW step per observation on that observation, "equal time"
takes as many on mini-batches of 32 from everything seen as fit into the filter's own seconds. Each method's one
hyper-parameter (forgetting; learning rate) is the best of its grid on a stream of its own.

Figures: root mean squared one-step error over the last quarter before the drift, the 200 steps after it, and the last
quarter; of rollouts of 50 steps on held-out streams; in units of the outputs' spread. Calibration: mean normalised
innovation squared (1 is right) and coverage of the central 90 % intervals, one step and 50 steps.
"""

import argparse
import gzip
import json
import math
import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from healing_text import clean
from record import RESULTS, environment, write

from hf_kalman.training import KalmanWorldModel, KalmanWorldModelConfig

STEPS, HORIZON, STARTS = 6000, 50, 40
FORGETTING, RATES = (1.0, 0.9995, 0.998, 0.99), (1e-4, 1e-3, 1e-2, 1e-1)
METHODS = ("kalman", "same model, equal data", "same model, equal time", "MLP, equal data", "MLP, equal time")
QUANTILE = 1.6448536269514722


def pendulum(steps, seed, drifted_at):
    import gymnasium

    env = gymnasium.make("Pendulum-v1", max_episode_steps=10**9)
    observation, _ = env.reset(seed=seed)
    generator, torque = torch.Generator().manual_seed(seed), 0.0
    rows, actions = [], []
    for step in range(steps):
        if step == drifted_at:
            env.unwrapped.l, env.unwrapped.m = 1.5, 1.3
        torque = 0.9 * torque + 0.8 * torch.randn((), generator=generator).item()
        rows.append(observation)
        actions.append([torque])
        observation = env.step([max(-2.0, min(2.0, torque))])[0]
    actions = torch.tensor(actions, dtype=torch.float32).clamp(-2, 2)
    return torch.tensor(np.stack(rows), dtype=torch.float32), actions, torch.zeros(steps, dtype=torch.bool)


def cartpole(steps, seed, drifted_at):
    import gymnasium

    env = gymnasium.make("CartPole-v1", max_episode_steps=10**9)
    observation, _ = env.reset(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows, actions, starts, begin = [], [], [], True
    for step in range(steps):
        if step == drifted_at:
            pole = env.unwrapped
            pole.length, pole.masspole, pole.force_mag = 0.9, 0.3, 7.0
            pole.total_mass, pole.polemass_length = pole.masspole + pole.masscart, pole.masspole * pole.length
        # Balances most of the time, so that episodes last.
        push = int(observation[2] + 0.3 * observation[3] + 0.05 * observation[1] > 0)
        push = push if torch.rand((), generator=generator) > 0.2 else 1 - push
        rows.append(observation)
        actions.append([2.0 * push - 1.0])
        starts.append(begin)
        observation, _, done, _, _ = env.step(push)
        begin = bool(done)
        if done:
            observation, _ = env.reset()
    return torch.tensor(np.stack(rows), dtype=torch.float32), torch.tensor(actions), torch.tensor(starts)


def sentences(steps, seed, drifted_at, corpus):
    found = []
    switch = steps if drifted_at is None else drifted_at
    for file, count in (("shakespeare.txt.gz", switch), ("brown.txt.gz", steps - switch)):
        with gzip.open(Path(corpus) / file, "rt", encoding="utf-8") as handle:
            text = clean(handle.read(4_000_000))
        lengths = [len(s.split()) for s in re.split(r"[.!?]+\s", text)]
        start = 500 + (seed * 3100) % max(1, len(lengths) - count - 600)
        found += lengths[start : start + count]
    rows = torch.tensor(found, dtype=torch.float32).add(1).log()[:, None]
    return rows, rows[:, :0], torch.zeros(steps, dtype=torch.bool)


class Mlp(torch.nn.Module):
    """Predicts differences from scaled inputs; the interface of `KalmanWorldModel` that the twins need."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(inputs, 64),
            torch.nn.Tanh(),
            torch.nn.Linear(64, 64),
            torch.nn.Tanh(),
            torch.nn.Linear(64, outputs),
        )

    def forward(self, z):
        return self.layers(z)


class Twin:
    """The same inputs, features and targets, weights by AdamW; variance from a running mean of squared errors."""

    def __init__(self, config, kind, rate, scales):
        torch.manual_seed(0)
        self.world, self.mlp = KalmanWorldModel(config), None
        for name, value in scales.items():
            getattr(self.world, name).copy_(value)
        if kind == "MLP":
            self.mlp = Mlp(self.world.center.numel(), config.observation_size)
        parameters = [self.world.weight] if self.mlp is None else list(self.mlp.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def change(self, state, action):
        """Predicted difference of the newest outputs, in units of their spread for the MLP."""
        if self.mlp is None:
            return self.world.features(state, action) @ self.world.weight.T
        z = (torch.cat([state, action], -1) - self.world.center) / self.world.spread
        return self.mlp(z) * self.world.output_spread

    def learn(self, states, actions, targets):
        error = (self.change(states, actions) - targets) / self.world.output_spread
        self.optimizer.zero_grad()
        error.square().mean().backward()
        self.optimizer.step()

    @torch.no_grad()
    def rollout(self, actions, observations):
        m, state, found = self.world.config.observation_size, observations.flip(0).flatten(), []
        for action in actions:
            new = state[:m] + self.change(state, action)
            state = torch.cat([new, state[: len(state) - m]])
            found.append(new)
        return torch.stack(found)


def transitions(observations, actions, starts, lags, first):
    """(index of the target, state, action, difference) of every transition within an episode."""
    age, rows = 0, []
    for t in range(len(observations)):
        age = 1 if starts[t] or t == 0 else age + 1
        if t >= first and age > lags:
            state = observations[t - lags : t].flip(0).flatten()
            rows.append((t, state, actions[t - 1], observations[t] - observations[t - 1]))
    return rows


def gradient_pass(config, kind, rate, stream, scales, seconds, half):
    """Prequential errors by index, the model before the drift, the model, and seconds."""
    twin, found, memory = Twin(config, kind, rate, scales), {}, []
    rows, before, started = transitions(*stream, config.lags, config.calibration_steps), None, time.perf_counter()
    generator, spent = torch.Generator().manual_seed(1), 0
    for number, (t, state, action, target) in enumerate(rows):
        if before is None and t >= half:
            before = {n: p.detach().clone() for n, p in (twin.mlp or twin.world).named_parameters()}
        with torch.no_grad():
            found[t] = target - twin.change(state, action)
        if seconds is None:
            twin.learn(state[None], action[None], target[None])
            continue
        memory.append((state, action, target))
        while time.perf_counter() - started < seconds * (number + 1) / len(rows):
            picked = torch.randint(len(memory), (32,), generator=generator).tolist()
            twin.learn(*(torch.stack(parts) for parts in zip(*(memory[i] for i in picked), strict=True)))
            spent += 1
    return found, before, twin, time.perf_counter() - started, spent or len(rows)


def kalman_pass(config, forgetting, stream, half):
    settings = {**config.to_dict(), "forgetting": forgetting}
    model = KalmanWorldModel(KalmanWorldModelConfig(**settings)).double()
    wide = [part.double() if part.is_floating_point() else part for part in stream]
    started = time.perf_counter()
    first = model.fit_stream(*(part[:half] for part in wide))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    second = model.fit_stream(*(part[half:] for part in wide))
    seconds = time.perf_counter() - started
    report = [torch.cat(parts) for parts in zip(first, second, strict=True)]
    return model, before, report, seconds


def rmse(errors, spread, low, high):
    rows = [error / spread for t, error in errors.items() if low <= t < high]
    return torch.stack(rows).square().mean().sqrt().item()


def windows(stream, lags, generator):
    """Places of a held-out stream from which HORIZON steps stay in one episode."""
    observations, actions, starts = stream
    places = [t for t in range(lags, len(observations) - HORIZON) if not starts[t - lags + 1 : t + HORIZON].any()]
    picked = torch.randperm(len(places), generator=generator)[:STARTS].tolist()
    return [
        (observations[p - lags : p], actions[p - 1 : p - 1 + HORIZON], observations[p : p + HORIZON])
        for p in (places[i] for i in picked)
    ]


def phases(steps, half, after):
    return {"before": (half - half // 4, half), "after": (half, half + after), "late": (steps - half // 4, steps)}


def run(task, method, value, seed, corpus, kalman_seconds):
    config, make = TASKS[task]
    half = STEPS // 2
    extra = (corpus,) if task == "sentences" else ()
    stream = make(STEPS, seed, half, *extra)
    held = (make(1500, 1000 + seed, None, *extra), make(1500, 2000 + seed, 0, *extra))
    generator = torch.Generator().manual_seed(seed)
    reference = KalmanWorldModel(config)
    reference.fit_stream(*(part[: config.calibration_steps + 1] for part in stream), learn=False)
    spread = stream[0][:half].std(0)
    result = {"task": task, "method": method, "value": value, "seed": seed}
    if method == "kalman":
        model, before, report, seconds = kalman_pass(config, value, stream, half)
        seen = [t for t in range(STEPS) if torch.isfinite(report[0][t]).all()]
        errors = {t: stream[0][t] - report[0][t] for t in seen}
        inside = {t: (errors[t].square() / report[1][t]).sqrt() < QUANTILE for t in seen}
        for name, (low, high) in phases(STEPS, half, 200).items():
            own = [t for t in seen if low <= t < high]
            result[f"nis_{name}"] = torch.stack([report[2][t] for t in own]).mean().item()
            result[f"coverage_{name}"] = torch.stack([inside[t] for t in own]).double().mean().item()
        versions = (before, {name: value.clone() for name, value in model.state_dict().items()})
    else:
        scales = {name: getattr(reference, name) for name in ("center", "spread", "output_spread")}
        seconds = kalman_seconds if "time" in method else None
        kind = method.split(",")[0]
        errors, before, twin, seconds, updates = gradient_pass(config, kind, value, stream, scales, seconds, half)
        result["updates"] = updates
        own = twin.mlp or twin.world
        versions = (before, {name: p.detach().clone() for name, p in own.named_parameters()})
    result["seconds"] = seconds
    for name, (low, high) in phases(STEPS, half, 200).items():
        result[f"one_step_{name}"] = rmse(errors, spread, low, high)
    for name, version, data in zip(("before", "late"), versions, held, strict=True):
        places, squares, inside = windows(data, config.lags, generator), [], []
        for past, actions, future in places:
            if method == "kalman":
                model.load_state_dict(version)
                given = {"actions": actions} if config.action_size else {"horizon": HORIZON}
                mean, variance = model.rollout(**given, observations=past)
                inside.append((future - mean).abs() < QUANTILE * variance.sqrt())
            else:
                own.load_state_dict({**own.state_dict(), **version})
                mean = twin.rollout(actions, past)
            # A diverging rollout counts as an error of ten spreads, for every method.
            squares.append(((future - mean) / spread).clamp(-10, 10).nan_to_num(10.0).square())
        result[f"rollout_{name}"] = torch.stack(squares).mean().sqrt().item()
        if inside:
            result[f"rollout_coverage_{name}"] = torch.stack(inside).double().mean().item()
    return result


TASKS = {
    "pendulum": (
        KalmanWorldModelConfig(observation_size=3, action_size=1, num_features=128, calibration_steps=100),
        pendulum,
    ),
    "cartpole": (
        KalmanWorldModelConfig(observation_size=4, action_size=1, num_features=64, calibration_steps=100),
        cartpole,
    ),
    "sentences": (
        KalmanWorldModelConfig(observation_size=1, lags=8, num_features=32, feature_scale=0.2, calibration_steps=100),
        sentences,
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"environment": environment(), "steps": STEPS, "horizon": HORIZON, "search": [], "runs": []}
    for task in options.tasks:
        seconds = None
        for method in METHODS:
            grid, tried = FORGETTING if method == "kalman" else RATES, []
            for value in grid:
                row = run(task, method, value, 100, options.corpus, seconds)
                tried.append(row)
                print(
                    json.dumps({k: row[k] for k in ("task", "method", "value", "seconds", "one_step_late")}), flush=True
                )
            if method == "kalman":
                seconds = statistics.median(row["seconds"] for row in tried)

            def score(row):
                found = math.hypot(*(row[f"one_step_{name}"] for name in ("before", "after", "late")))
                return found if math.isfinite(found) else math.inf

            best = min(tried, key=score)["value"]
            result["search"] += tried
            result["runs"] += [run(task, method, best, s, options.corpus, seconds) for s in range(1, options.seeds + 1)]
    names = [k for k in result["runs"][0] if k not in ("task", "method", "value", "seed")]
    result["summary"] = []
    for task in options.tasks:
        for method in METHODS:
            own = [row for row in result["runs"] if (row["task"], row["method"]) == (task, method)]
            figures = {n: [row[n] for row in own] for n in names if n in own[0]}
            mean = {n: statistics.mean(values) for n, values in figures.items()}
            spread = {n: statistics.stdev(values) for n, values in figures.items()}
            result["summary"].append(
                {"task": task, "method": method, "value": own[0]["value"], "mean": mean, "deviation": spread}
            )
            print(json.dumps({"task": task, "method": method, **{n: round(v, 4) for n, v in mean.items()}}), flush=True)
    write("world_model", result, options.output)


if __name__ == "__main__":
    main()

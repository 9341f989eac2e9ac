r"""A latent state-space model, trained in one pass by two coupled Kalman filters: on its state and on its weights.

With observations y_t (m), actions u_t (k), and a latent x_t that stacks the last `lags` outputs (so that C = [I 0]):

    x_{t+1} = f(x_t, u_t; Theta) + w_t,   f: newest block + Theta phi(z_t), older blocks move on,   w ~ N(0, Q)
    y_t     = C x_t + v_t,                                                                          v ~ N(0, R)
    phi(z)  = [1, z, cos(W z + b)],       z = (x, u) in units of their own spread

State filter, with F = df/dx in closed form and the uncertainty of the weights beside Q:

    x^- = f(x^+, u),   P^- = F P^+ F^T + Q + (phi^T P_Theta phi) s,   nu = y - C x^-,   S = C P^- C^T + R
    K = P^- C^T S^{-1},   x^+ = x^- + K nu,   P^+ = (I - K C) P^- (I - K C)^T + K R K^T

Weight filter: df/dTheta is phi^T in every row, all rows share one covariance (in units of the noise s of their output):

    k = P_Theta phi / (1 + phi^T P_Theta phi),   Theta <- Theta + nu k^T,   P_Theta <- P_Theta - k phi^T P_Theta

with `KalmanWorldModelConfig`'s forgetting, decay and process noise before it. s is a running mean of nu^2, of which
`observation_share` is R and the rest Q. Nothing is differentiated: one pass, no graph, memory of one step.

[dual extended Kalman filter: standard; random features: Rahimi and Recht 2007. This form, random features with a shared
covariance and a truncated derivative, is ours; arXiv 2603.13423 names the idea, its own equations are not known to us]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .checks import check_ranges
from .covariance import cap_variances, passage_of_time

__all__ = [
    "KalmanWorldModel",
    "KalmanWorldModelConfig",
    "KalmanWorldModelOutput",
    "WorldModelReport",
]


class KalmanWorldModelConfig(PreTrainedConfig):
    """Configuration of a `KalmanWorldModel`.

    Args:
        observation_size: m, numbers in an observation.
        action_size: k, numbers in an action; 0 for none.
        lags: outputs that the latent state stacks, 1 where observations are the whole state.
        num_features: random features beside the linear ones.
        feature_scale: spread of W: how fast features vary, in units of one over the inputs' spread.
        calibration_steps: first steps from which the spread of the inputs is taken; nothing is learned in them.
        prior_variance: P_0 of each weight, in units of the output's noise variance.
        process_noise: variance that a step adds to each weight, in the same units.
        forgetting: lambda in (0, 1]; below 1 the variance is kept at `prior_variance` or less.
        decay: share of the way back to the prior's variance that a step takes.
        observation_share: share of the innovation's variance that is noise of the observation, in [0, 1).
        noise_memory: steps over which the innovation's variance is averaged.
        seed: of the random features.
    """

    model_type = "kalman_world_model"

    def __init__(
        self,
        observation_size: int = 1,
        action_size: int = 0,
        lags: int = 1,
        num_features: int = 128,
        feature_scale: float = 0.5,
        calibration_steps: int = 32,
        prior_variance: float = 100.0,
        process_noise: float = 0.0,
        forgetting: float = 1.0,
        decay: float = 0.0,
        observation_share: float = 0.0,
        noise_memory: int = 100,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_ranges(
            "KalmanWorldModelConfig",
            (
                ("observation_size", observation_size, observation_size >= 1, ">= 1"),
                ("action_size", action_size, action_size >= 0, ">= 0"),
                ("lags", lags, lags >= 1, ">= 1"),
                ("num_features", num_features, num_features >= 0, ">= 0"),
                ("calibration_steps", calibration_steps, calibration_steps >= 2, ">= 2"),
                ("prior_variance", prior_variance, prior_variance > 0, "> 0"),
                ("process_noise", process_noise, process_noise >= 0, ">= 0"),
                ("forgetting", forgetting, 0 < forgetting <= 1, "in (0, 1]"),
                ("decay", decay, 0 <= decay <= 1, "in [0, 1]"),
                ("observation_share", observation_share, 0 <= observation_share < 1, "in [0, 1)"),
                ("noise_memory", noise_memory, noise_memory >= 1, ">= 1"),
            ),
        )
        self.observation_size, self.action_size, self.lags = observation_size, action_size, lags
        self.num_features, self.feature_scale, self.calibration_steps = num_features, feature_scale, calibration_steps
        self.prior_variance, self.process_noise = prior_variance, process_noise
        self.forgetting, self.decay = forgetting, decay
        self.observation_share, self.noise_memory, self.seed = observation_share, noise_memory, seed
        super().__init__(**kwargs)


class WorldModelReport(NamedTuple):
    """What a pass over a stream predicted, every step before it was seen.

    Args:
        predictions: (T, m), NaN in steps without one (the first of a stream or an episode).
        variances: (T, m) of the predictions, noise of the observation included.
        squares: (T,) normalised innovation squared, nu^T S^{-1} nu / m; 1 in the mean where variances are right.
    """

    predictions: Tensor
    variances: Tensor
    squares: Tensor


@dataclass
class KalmanWorldModelOutput(ModelOutput):
    """Output of `KalmanWorldModel.forward`.

    Args:
        loss: mean squared error in units of the outputs' spread, where there is something to predict.
        predictions: (B, T - lags, m) of observations `lags` to T - 1.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None


class KalmanWorldModel(PreTrainedModel):
    """State-space model learned in one pass; see the module for its equations.

        model = KalmanWorldModel(KalmanWorldModelConfig(observation_size=3, action_size=1))
        report = model.fit_stream(observations, actions)              # predicts, then learns
        mean, variance = model.rollout(observations[-1:], planned_actions)

    `forward` computes one-step predictions from true observations and is differentiable in the weights, so that the
    same model can be trained by the stock `Trainer` instead.
    """

    config_class = KalmanWorldModelConfig
    base_model_prefix = "world_model"
    main_input_name = "observations"
    feature_rows: Tensor
    feature_phases: Tensor
    covariance: Tensor
    noise: Tensor
    center: Tensor
    spread: Tensor
    output_spread: Tensor
    steps: Tensor
    state: Tensor
    state_covariance: Tensor
    missing: Tensor
    last_action: Tensor
    calibration: Tensor
    seen: Tensor

    def __init__(self, config: KalmanWorldModelConfig) -> None:
        super().__init__(config)
        m, k, d = config.observation_size, config.action_size, config.observation_size * config.lags
        size = 1 + d + k + config.num_features
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(config.num_features, d + k, generator=generator) * config.feature_scale
        phases = 2 * torch.pi * torch.rand(config.num_features, generator=generator)
        self.weight = nn.Parameter(torch.zeros(m, size))
        own = {
            "feature_rows": rows,
            "feature_phases": phases,
            "covariance": config.prior_variance * torch.eye(size),
            "noise": torch.ones(m),
            "center": torch.zeros(d + k),
            "spread": torch.ones(d + k),
            "output_spread": torch.ones(m),
            "steps": torch.zeros(()),
            "state": torch.zeros(d),
            "state_covariance": torch.zeros(d, d),
            # What is still missing of the first state of an episode, and the last action.
            "missing": torch.tensor(float(config.lags)),
            "last_action": torch.zeros(k),
            "calibration": torch.zeros(config.calibration_steps, m + k),
            "seen": torch.zeros(()),
        }
        for name, value in own.items():
            self.register_buffer(name, value)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are the prior's mean, 0."""

    # -- the model -----------------------------------------------------------------------------------------------------

    def features(self, state: Tensor, action: Tensor) -> Tensor:
        """Phi of states (..., d) and actions (..., k): (..., 1 + d + k + num_features)."""
        z = (torch.cat([state, action], -1) - self.center) / self.spread
        waves = torch.cos(z @ self.feature_rows.T + self.feature_phases) * (2 / max(len(self.feature_phases), 1)) ** 0.5
        return torch.cat([torch.ones_like(z[..., :1]), z, waves], -1)

    def transition(self, state: Tensor, action: Tensor) -> Tensor:
        """Mean of the next state."""
        m = self.config.observation_size
        new = state[..., :m] + self.features(state, action) @ self.weight.T
        return torch.cat([new, state[..., : state.shape[-1] - m]], -1)

    def jacobian(self, state: Tensor, action: Tensor) -> Tensor:
        """F = d transition / d state, (d, d), in closed form."""
        m, d = self.config.observation_size, state.shape[-1]
        z = (torch.cat([state, action], -1) - self.center) / self.spread
        slopes = -torch.sin(z @ self.feature_rows.T + self.feature_phases)
        slopes = slopes * (2 / max(len(self.feature_phases), 1)) ** 0.5
        linear, waves = self.weight[:, 1 : 1 + d], self.weight[:, 1 + len(z) :]
        inner = linear + (waves * slopes) @ self.feature_rows[:, :d]
        jacobian = torch.zeros(d, d, dtype=state.dtype, device=state.device)
        jacobian[:m] = inner / self.spread[:d]
        jacobian[:m, :m] += torch.eye(m, dtype=state.dtype, device=state.device)
        jacobian[m:, : d - m] = torch.eye(d - m, dtype=state.dtype, device=state.device)
        return jacobian

    def forward(
        self, observations: Tensor, actions: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> KalmanWorldModelOutput:
        """One-step predictions from true observations.

        Args:
            observations: (B, T, m), T > lags.
            actions: (B, T, k), action t taken after observation t.
            labels: what to predict in place of `observations`.
            kwargs: further columns of a data set, not used.
        """
        lags, length = self.config.lags, observations.shape[1]
        # Newest first, as in the state.
        stacked = torch.cat([observations[:, lags - 1 - i : length - 1 - i] for i in range(lags)], -1)
        taken = observations[..., :0] if actions is None else actions
        predictions = stacked[..., : self.config.observation_size]
        predictions = predictions + self.features(stacked, taken[:, lags - 1 : length - 1]) @ self.weight.T
        wanted = (observations if labels is None else labels)[:, lags:]
        loss = ((predictions - wanted) / self.output_spread).square().mean()
        return KalmanWorldModelOutput(loss=loss, predictions=predictions)

    # -- one pass ------------------------------------------------------------------------------------------------------

    def start_episode(self) -> None:
        """Forget the state, not the weights: the next observation does not follow from the last."""
        self.missing.fill_(float(self.config.lags))

    @torch.inference_mode()
    def fit_stream(
        self, observations: Tensor, actions: Tensor | None = None, starts: Tensor | None = None, learn: bool = True
    ) -> WorldModelReport:
        """Predict each observation of a stream, then filter state and weights with it; goes on where it stopped.

        Args:
            observations: (T, m).
            actions: (T, k): action t is taken after observation t.
            starts: (T,) bool, where a new episode begins; only the model's first call does when None.
            learn: False filters the state alone.

        Raises:
            ValueError: a wrong shape, or numbers that are not finite; nothing is learned then.
        """
        config = self.config
        actions = observations.new_zeros(len(observations), 0) if actions is None else actions
        wanted = ((len(observations), config.observation_size), (len(observations), config.action_size))
        if (tuple(observations.shape), tuple(actions.shape)) != wanted:
            raise ValueError(
                f"KalmanWorldModel.fit_stream: `observations` and `actions` must be {wanted[0]} and {wanted[1]}, got "
                f"{tuple(observations.shape)} and {tuple(actions.shape)}."
            )
        if not (torch.isfinite(observations).all() and torch.isfinite(actions).all()):
            raise ValueError(
                "KalmanWorldModel.fit_stream: `observations` or `actions` are not finite; nothing was learned."
            )
        kind = {"dtype": self.covariance.dtype, "device": self.covariance.device}
        observations, actions = observations.to(**kind), actions.to(**kind)
        begins = [False] * len(observations) if starts is None else starts.tolist()
        rows = []
        for observation, action, begin in zip(observations, actions, begins, strict=True):
            if begin:
                self.start_episode()
            rows.append(self._step(observation, action, learn))
        predictions, variances, squares = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return WorldModelReport(predictions, variances, squares)

    def _step(self, observation: Tensor, action: Tensor, learn: bool) -> tuple[Tensor, Tensor, Tensor]:
        m, nothing = self.config.observation_size, torch.full_like(observation, float("nan"))
        if self.missing > 0 or self.seen < self.config.calibration_steps:
            self._gather(observation, action)
            return nothing, nothing, nothing[0]
        phi = self.features(self.state, self.last_action)
        self._predict_weights(learn)
        spread = phi @ self.covariance @ phi
        state, covariance = self._predicted(phi, spread)
        share = self.config.observation_share
        noise = share * self.noise + 1e-12
        inner = covariance[:m, :m] + noise.diag()
        innovation = observation - state[:m]
        lower = torch.linalg.cholesky(inner)
        square = torch.linalg.solve_triangular(lower, innovation[:, None], upper=False).square().sum() / m
        gain = torch.cholesky_solve(covariance[:m], lower).T
        keep = torch.eye(len(state), dtype=state.dtype, device=state.device)
        keep[:, :m] -= gain
        self.state.copy_(state + gain @ innovation)
        updated = keep @ covariance @ keep.T + gain @ noise.diag() @ gain.T
        self.state_covariance.copy_((updated + updated.T) / 2)
        if learn:
            self._learn(phi, spread, innovation)
        self.last_action.copy_(action)
        return state[:m].clone(), inner.diagonal().clone(), square

    def _predicted(self, phi: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """x^- and P^-, with the process noise and what the weights' uncertainty adds."""
        m = self.config.observation_size
        jacobian = self.jacobian(self.state, self.last_action)
        covariance = jacobian @ self.state_covariance @ jacobian.T
        covariance[:m, :m] += ((1 - self.config.observation_share + spread) * self.noise).diag()
        new = self.state[:m] + self.weight @ phi
        return torch.cat([new, self.state[: len(self.state) - m]]), covariance

    def _predict_weights(self, learn: bool) -> None:
        config = self.config
        scale, shift = passage_of_time(config.prior_variance, config.process_noise, config.forgetting, config.decay)
        if not learn or (scale, shift) == (1.0, 0.0):
            return
        self.covariance.mul_(scale).diagonal().add_(shift)
        if config.forgetting < 1:
            # Without excitation a variance would grow for ever.
            cap_variances(self.covariance, config.prior_variance)

    def _learn(self, phi: Tensor, spread: Tensor, innovation: Tensor) -> None:
        direction = self.covariance @ phi
        gain = direction / (1 + spread)
        self.weight += torch.outer(innovation, gain)
        self.covariance -= torch.outer(gain, direction)
        self.covariance.copy_((self.covariance + self.covariance.T) / 2)
        self.steps += 1
        # An innovation is larger than the noise by what the weights did not know.
        weight = 1 / self.steps.clamp(max=self.config.noise_memory)
        self.noise += weight * (innovation.square() / (1 + spread) - self.noise)

    def _gather(self, observation: Tensor, action: Tensor) -> None:
        """Fill the state of a new episode, and, at the very beginning, the sample that scales the inputs."""
        config, m = self.config, self.config.observation_size
        if self.seen < config.calibration_steps:
            self.calibration[int(self.seen)] = torch.cat([observation, action])
            self.seen += 1
            if self.seen == config.calibration_steps:
                self._calibrate()
        older = self.state[: len(self.state) - m].clone()
        self.state.copy_(torch.cat([observation, older]))
        if self.missing == config.lags:
            self.state.copy_(observation.repeat(config.lags))
        self.state_covariance.zero_()
        share = (config.observation_share * self.noise).repeat(config.lags)
        self.state_covariance.diagonal().copy_(share)
        self.missing.sub_(1).clamp_(min=0)
        self.last_action.copy_(action)

    def _calibrate(self) -> None:
        m, lags = self.config.observation_size, self.config.lags
        center, spread = self.calibration.mean(0), self.calibration.std(0)
        spread = torch.where(spread > 1e-6 * (1 + center.abs()), spread, torch.ones_like(spread))
        for own, values in ((self.center, center), (self.spread, spread)):
            own.copy_(torch.cat([values[:m].repeat(lags), values[m:]]))
        self.output_spread.copy_(spread[:m])
        self.noise.copy_(spread[:m].square())

    @torch.inference_mode()
    def rollout(
        self, actions: Tensor | None = None, horizon: int | None = None, observations: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means and variances of the observations to come, (H, m) each, noise of the observation included.

        Variances are those of the linearised model: of noise and of the weights, which are wrong alike at every step.

        Args:
            actions: (H, k): the first is taken now, after the last observation.
            horizon: H, where there are no actions.
            observations: (lags, m), oldest first: start from these instead of the filtered state.

        Raises:
            ValueError: neither `actions` nor `horizon`, or a wrong shape.
        """
        config, m = self.config, self.config.observation_size
        if (actions is None) == (horizon is None) or (config.action_size > 0 and actions is None):
            raise ValueError(
                "KalmanWorldModel.rollout: give `actions` for a model with actions, `horizon` for one without, got "
                f"actions {None if actions is None else tuple(actions.shape)} and horizon {horizon!r}."
            )
        steps = self.state.new_zeros(horizon or 0, 0) if actions is None else actions.to(self.state)
        if observations is None:
            state, covariance = self.state.clone(), self.state_covariance.clone()
        else:
            if tuple(observations.shape) != (config.lags, m):
                raise ValueError(
                    f"KalmanWorldModel.rollout: `observations` must be {(config.lags, m)}, got "
                    f"{tuple(observations.shape)}."
                )
            state = observations.to(self.state).flip(0).flatten()
            covariance = (config.observation_share * self.noise).repeat(config.lags).diag()
        means, variances, d, size = [], [], len(state), self.weight.shape[1]
        # Weights are wrong in the same way at every step: their covariance with the state is carried along.
        cross = state.new_zeros(m, d, size)
        for action in steps:
            phi, jacobian = self.features(state, action), self.jacobian(state, action)
            spread = self.noise[:, None] * (self.covariance @ phi)
            mixed = (cross @ phi) @ jacobian.T
            covariance = jacobian @ covariance @ jacobian.T
            covariance[:m] += mixed
            covariance[:, :m] += mixed.T
            covariance[:m, :m] += ((1 - config.observation_share) * self.noise + spread @ phi).diag()
            cross = jacobian @ cross
            cross[torch.arange(m), torch.arange(m)] += spread
            state = self.transition(state, action)
            means.append(state[:m])
            variances.append(covariance.diagonal()[:m] + config.observation_share * self.noise)
        return torch.stack(means), torch.stack(variances)

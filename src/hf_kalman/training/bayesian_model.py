"""Frozen classifiers of the host with a Bayesian head that learns from a stream, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .bayesian_head import KalmanBayesianHead, log_of

__all__ = [
    "KalmanBayesianConfig",
    "KalmanBayesianDecisionTransformer",
    "KalmanBayesianForCausalLM",
    "KalmanBayesianForSequenceClassification",
    "KalmanBayesianForTokenClassification",
    "KalmanBayesianOutput",
    "StreamReport",
]


class KalmanBayesianConfig(PreTrainedConfig):
    """Configuration of a classifier with a Bayesian head.

    Args:
        classifier_config: of the classifier whose last linear layer the head replaces, as a dictionary with its
            `model_type`.
        linear: name of that layer in the classifier; empty for a model without one.
        head_sizes: widths of the head.
        head_options: further arguments of `KalmanBayesianHead`.
        token_ids: of a language model: the tokens that are the classes.
    """

    model_type = "kalman_bayesian"

    def __init__(
        self,
        classifier_config: dict[str, Any] | None = None,
        linear: str = "score",
        head_sizes: list[int] | None = None,
        head_options: dict[str, Any] | None = None,
        token_ids: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.classifier_config, self.linear, self.token_ids = classifier_config, linear, token_ids
        self.head_sizes, self.head_options = head_sizes, dict(head_options or {})
        super().__init__(**kwargs)


@dataclass
class KalmanBayesianOutput(ModelOutput):
    """Output of a classifier with a Bayesian head.

    Args:
        loss: mean of -log of the labels' predictive probabilities, in nats.
        logits: (B, V) or (B, T, V): logarithms of the predictive probabilities; None for a regression.
        variances: of the same shape: of the head's outputs, in squared nats; of a regression, in squares of its values.
        probability_variances: of the same shape: of the probabilities; None for a regression.
        values: (B, V) or (B, T, V) of a regression, its means; None for classes.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    variances: Tensor | None = None
    probability_variances: Tensor | None = None
    values: Tensor | None = None


class StreamReport(NamedTuple):
    """What a pass over a stream scored, every label before it was learned from.

    Args:
        log_likelihoods: of the labels, in nats.
        correct: whether the likeliest class was right; empty for a regression.
        seen: samples that the model has learned from in all.
    """

    log_likelihoods: list[float]
    correct: list[bool]
    seen: int


class _KalmanBayesianClassifier(PreTrainedModel):
    config_class = KalmanBayesianConfig
    base_model_prefix = "classifier"
    auto: Any = None
    # Where the classifier returns what goes into its last layer, once that is the identity.
    output = "logits"
    # Always 0.
    _keys_to_ignore_on_save = ["anchor"]
    _keys_to_ignore_on_load_missing = ["anchor"]

    def __init__(self, config: KalmanBayesianConfig) -> None:
        super().__init__(config)
        if config.classifier_config is None or config.head_sizes is None:
            raise ValueError(
                f"{type(self).__name__}: `config` must hold `classifier_config` and `head_sizes`; make the model with "
                "from_classifier."
            )
        inner = AutoConfig.for_model(**config.classifier_config)
        self.classifier = self.auto.from_config(inner)
        if config.linear:
            self.classifier.set_submodule(config.linear, nn.Identity())
        self.classifier.requires_grad_(False)
        self.head = KalmanBayesianHead(config.head_sizes, **config.head_options)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        # What a Trainer differentiates: the filter needs no gradient, and this one is 0.
        self.anchor = nn.Parameter(torch.zeros(()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The classifier's own weights are its business; the head begins where it is put."""
        if module is self:
            init.zeros_(self.anchor)

    @classmethod
    def from_classifier(cls, model: PreTrainedModel, mode: str = "copy_negative_inputs", **options: Any):
        """A classifier's probabilities and a head that can learn; the classifier's weights are shared.

        Args:
            model: classifier of the host or of this package, trained or not.
            mode: see `KalmanBayesianHead.from_linear`.
            options: of the head.

        Raises:
            ValueError: the model has no last linear layer with as many outputs as labels.
        """
        return cls._around(model, *cls._last_linear(model), mode, options)

    @classmethod
    def _around(cls, model: PreTrainedModel, name: str, linear: nn.Linear, mode: str, options: dict[str, Any]):
        """The model with a head that begins as `linear` in place of the module `name`, or last where that is ""."""
        head = KalmanBayesianHead.from_linear(linear, mode, **options)
        config = KalmanBayesianConfig(
            classifier_config=model.config.to_dict(),
            linear=name,
            head_sizes=list(head.sizes),
            head_options={"likelihood": "categorical", **options},
            id2label=model.config.id2label,
            label2id=model.config.label2id,
        )
        with torch.device("meta"):
            made = cls(config)
        if name:
            model.set_submodule(name, nn.Identity())
        made.classifier, made.head = model.requires_grad_(False), head
        made.seen = torch.zeros((), dtype=torch.int64, device=linear.weight.device)
        made.anchor = nn.Parameter(torch.zeros((), device=linear.weight.device))
        return made.eval()

    @classmethod
    def _last_linear(cls, model: PreTrainedModel) -> tuple[str, nn.Linear]:
        """The layer that the head replaces, and the name of the module that becomes the identity."""
        count = model.config.num_labels
        fitting = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == count]
        if not fitting:
            raise ValueError(
                f"{cls.__name__}.from_classifier: `model` must have a linear layer with {count} outputs, one for each "
                f"label, got {type(model).__name__}."
            )
        return fitting[-1], cast(nn.Linear, model.get_submodule(fitting[-1]))

    @torch.no_grad()
    def features(self, **inputs: Any) -> Tensor:
        """What the head reads: (B, inputs), or (B, T, inputs) where every token has an output."""
        training = self.classifier.training
        self.classifier.eval()
        try:
            return self.classifier(**inputs)[self.output].float()
        finally:
            self.classifier.train(training)

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> KalmanBayesianOutput:
        """Predictive distribution of inputs of the classifier; in training mode the labels are learned, too.

        So the stock `Trainer` streams: every row of its batches is scored and then learned from, in their order. The
        loss is what was scored, its gradient 0: the Trainer's own optimizer changes nothing. Its
        `remove_unused_columns` must be False, its `train_sampling_strategy` "sequential" for a stream.

        Args:
            labels: as `fit_stream` takes them, in batches: (B,) or (B, T) classes, -100 for none; of a regression
                values (B, V) or (B, T, V), learned in training mode and not scored otherwise.
            inputs: of the classifier.
        """
        with torch.no_grad():
            features = self.features(**inputs)
            found = self.head(features)
            logits = None if found.probabilities is None else log_of(found.probabilities)
            values = found.mean if logits is None else None
            loss = None
            if labels is not None and self.training:
                scores, _ = self._learn(features, self._classes(labels))
                self.seen += len(features)
                loss = -features.new_tensor(scores).mean()
            elif labels is not None and logits is not None:
                wanted = self._classes(labels).flatten()
                loss = nn.functional.nll_loss(logits.flatten(0, -2), wanted, ignore_index=-100)
        loss = loss if loss is None or not self.training else loss + 0 * self.anchor
        return KalmanBayesianOutput(loss, logits, found.variance, found.probability_variance, values)

    def _classes(self, labels: Tensor) -> Tensor:
        """Labels as the head's classes."""
        return labels

    def _learn(self, features: Tensor, labels: Tensor) -> tuple[list[float], list[bool]]:
        """Log-likelihoods of the labels before each was learned, and whether the likeliest class was right."""
        features = features.reshape(-1, self.head.sizes[0])
        labels = labels.reshape(-1, self.head.sizes[-1]) if labels.is_floating_point() else labels.reshape(-1)
        scores, correct = [], []
        for row, label in zip(features, labels, strict=True):
            if label.isnan().all() if label.is_floating_point() else label == -100:
                continue
            if not label.is_floating_point():
                correct.append(bool(self.head(row[None]).mean[0].argmax() == label))
            scores.append(self.head.filter_step(row, label))
        return scores, correct

    @torch.no_grad()
    def fit_stream(
        self,
        samples: Iterable[dict[str, Any]],
        *,
        resume: bool = False,
        progress: bool = False,
        after: Callable[[int, float], None] | None = None,
    ) -> StreamReport:
        """Learn from samples in their order, one in memory, each scored before it is learned from.

        Args:
            samples: dictionaries of unbatched inputs and `labels`: a class, or one for each token (-100 for none); of a
                regression values (V,) or (T, V), with rows of NaN for none.
            resume: leave out the first samples, as many as the model has seen: a saved model goes on in the same
                stream where it stopped, bit for bit.
            progress: whether to show a progress bar.
            after: called after each sample with its number and its mean log-likelihood.

        Raises:
            ValueError: a sample without labels, or one that the head refuses; samples before it have been learned.
        """
        scores: list[float] = []
        correct: list[bool] = []
        rows = logging.tqdm(samples, disable=not progress)
        for number, sample in enumerate(rows):
            if resume and number < int(self.seen):
                continue
            if "labels" not in sample:
                raise ValueError(
                    f"{type(self).__name__}.fit_stream: sample {number} must have `labels`, got {list(sample)}."
                )
            inputs = {k: torch.as_tensor(v, device=self.device)[None] for k, v in sample.items() if k != "labels"}
            labels = self._classes(torch.as_tensor(sample["labels"], device=self.device))
            own, right = self._learn(self.features(**inputs)[0], labels)
            scores += own
            correct += right
            self.seen += 1
            if after is not None:
                after(number, sum(own) / max(len(own), 1))
        return StreamReport(scores, correct, int(self.seen))


class KalmanBayesianForSequenceClassification(_KalmanBayesianClassifier):
    """Sequence classifier of the host, frozen, with a `KalmanBayesianHead` in place of its last linear layer.

    model = KalmanBayesianForSequenceClassification.from_classifier(classifier, variance=(0.0, 0.1))
    report = model.fit_stream(samples)
    model.save_pretrained("adapted")
    """

    auto = AutoModelForSequenceClassification


class KalmanBayesianForTokenClassification(_KalmanBayesianClassifier):
    """As `KalmanBayesianForSequenceClassification`, for one label per token."""

    auto = AutoModelForTokenClassification


class KalmanBayesianDecisionTransformer(_KalmanBayesianClassifier):
    """`DecisionTransformerModel` of the host, frozen, with a `KalmanBayesianHead` for its actions.

    Discretised actions: a model with one-hot actions whose `action_preds` are logits, and the head's default
    likelihood; `logits` (B, T, act_dim) are of the action at each state. Continuous ones: likelihood="gaussian", and
    `values`.

    model = KalmanBayesianDecisionTransformer.from_classifier(transformer, "direct", variance=0.1)
    model.fit_stream(samples)  # dictionaries of states, actions, returns_to_go, timesteps, labels
    """

    auto = AutoModel
    output = "action_preds"

    @classmethod
    def _last_linear(cls, model: PreTrainedModel) -> tuple[str, nn.Linear]:
        predict = getattr(model, "predict_action", None)
        if not isinstance(predict, nn.Sequential) or len(predict) != 1 or not isinstance(predict[0], nn.Linear):
            raise ValueError(
                f"{cls.__name__}.from_classifier: `model` must be a DecisionTransformerModel with action_tanh=False, "
                f"whose actions are linear in what it read, got {type(model).__name__}."
            )
        return "predict_action", cast(nn.Linear, predict[0])


class KalmanBayesianForCausalLM(_KalmanBayesianClassifier):
    """Language model, frozen, with a `KalmanBayesianHead` that says which of a few tokens comes next.

    The head begins as the rows of `lm_head` for those tokens; `labels` are token ids at the position that predicts them
    (no shift), and others than those tokens count as none.

    model = KalmanBayesianForCausalLM.from_language_model(model, tokenizer.convert_tokens_to_ids(["yes", "no"]))
    """

    # Without its head, which may be tied to the embeddings.
    auto = AutoModel
    output = "last_hidden_state"

    @classmethod
    def from_language_model(cls, model: PreTrainedModel, token_ids: list[int], mode: str = "direct", **options: Any):
        """A language model that answers with one of some tokens, with its own probabilities of them at first.

        Args:
            model: causal language model; its weights are shared.
            token_ids: the tokens, at least two.
            mode: see `KalmanBayesianHead.from_linear`.
            options: of the head.

        Raises:
            ValueError: fewer than two tokens, some twice or not of the vocabulary; or logits that are no linear
                function of the hidden states.
        """
        config, head = model.config, cast(nn.Linear, model.get_output_embeddings())
        unfit = len(set(token_ids)) != len(token_ids) or len(token_ids) < 2
        if unfit or not 0 <= min(token_ids) <= max(token_ids) < config.vocab_size:
            raise ValueError(
                f"{cls.__name__}.from_language_model: `token_ids` must be two or more different ids below "
                f"{config.vocab_size}, got {token_ids!r}."
            )
        if getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_scaling", 1.0) != 1.0:
            raise ValueError(
                f"{cls.__name__}.from_language_model: `model` must have logits that are linear in its hidden states, "
                "got final_logit_softcapping or logits_scaling."
            )
        kept = nn.Linear(head.in_features, len(token_ids), bias=head.bias is not None, device=head.weight.device)
        with torch.no_grad():
            kept.weight.copy_(head.weight[token_ids])
            if head.bias is not None:
                kept.bias.copy_(head.bias[token_ids])
        made = cls._around(cast(PreTrainedModel, model.base_model), "", kept, mode, options)
        made.config.token_ids = [int(token) for token in token_ids]
        return made

    @classmethod
    def _last_linear(cls, model: PreTrainedModel) -> tuple[str, nn.Linear]:
        raise ValueError(f"{cls.__name__}: use from_language_model(model, token_ids).")

    def _classes(self, labels: Tensor) -> Tensor:
        tokens = torch.tensor(self.config.token_ids, device=labels.device)
        equal = labels[..., None] == tokens
        return torch.where(equal.any(-1), equal.int().argmax(-1), -100)

"""Classifiers of the host with a Bayesian head: the same at first, learning from a stream, saved and loaded."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_kalman import GKAConfig, GKAForSequenceClassification, GKAForTokenClassification
from hf_kalman.training import (
    KalmanBayesianConfig,
    KalmanBayesianForSequenceClassification,
    KalmanBayesianForTokenClassification,
)

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_labels": 3}
DECODER = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
ENCODER = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 32}


def classifier(kind):
    torch.manual_seed(0)
    return {
        "bert": lambda: BertForSequenceClassification(BertConfig(**ENCODER)),
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER)),
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**DECODER)),
        "gka": lambda: GKAForSequenceClassification(GKAConfig(**DECODER)),
        "gka tokens": lambda: GKAForTokenClassification(GKAConfig(**DECODER)),
    }[kind]().eval()


def samples(count=60, tokens=False):
    """Rows whose first token says their class; with a class for each token, the token's own."""
    ids = torch.randint(2, 40, (count, 8), generator=torch.Generator().manual_seed(1))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row % 3 if tokens else row[0] % 3}
        for row in ids
    ]


def batch(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


KINDS = ["bert", "roberta", "llama", "gka"]


@pytest.mark.parametrize("kind", [*KINDS, "gka tokens"])
def test_a_new_model_says_what_the_classifier_said(kind):
    cls = KalmanBayesianForTokenClassification if "tokens" in kind else KalmanBayesianForSequenceClassification
    rows = batch(samples(5, "tokens" in kind))
    with torch.no_grad():
        wanted = classifier(kind)(**rows)
    model = cls.from_classifier(classifier(kind), variance=1e-3)
    found = model(**rows)
    torch.testing.assert_close(found.logits.exp(), wanted.logits.softmax(-1), rtol=0, atol=2e-6)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    assert (found.variances > 0).all() and [n for n, p in model.named_parameters() if p.requires_grad] == ["anchor"]


@pytest.mark.parametrize("kind", [*KINDS, "gka tokens"])
def test_a_stream_is_learned_one_sample_at_a_time(kind):
    cls = KalmanBayesianForTokenClassification if "tokens" in kind else KalmanBayesianForSequenceClassification
    model = classifier(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # Random features that tell tokens apart.
    model = cls.from_classifier(model, variance=(0.0, 1.0), covariance="full")
    before = {name: value.clone() for name, value in model.classifier.state_dict().items()}
    report = model.fit_stream(samples(150, "tokens" in kind))
    third = len(report.log_likelihoods) // 3
    first, last = (sum(part) / third for part in (report.log_likelihoods[:third], report.log_likelihoods[-third:]))
    assert last > first and report.seen == 150
    assert all(torch.equal(value, before[name]) for name, value in model.classifier.state_dict().items())


@pytest.mark.parametrize("kind", ["bert", "gka", "gka tokens"])
def test_a_saved_model_goes_on_in_its_stream_bit_for_bit(kind, tmp_path):
    tokens = "tokens" in kind
    cls = KalmanBayesianForTokenClassification if tokens else KalmanBayesianForSequenceClassification
    auto = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    options = {"variance": (0.0, 0.1), "forgetting": 0.99}
    stream = samples(30, tokens)
    whole = cls.from_classifier(classifier(kind), **options)
    expected = whole.fit_stream(stream).log_likelihoods
    first = cls.from_classifier(classifier(kind), **options)
    found = first.fit_stream(stream[:12]).log_likelihoods
    first.save_pretrained(tmp_path)
    second = auto.from_pretrained(tmp_path)
    assert type(second) is cls and second.config.id2label == first.config.id2label
    report = second.fit_stream(stream, resume=True)
    assert found + report.log_likelihoods == expected and report.seen == 30
    again = batch(stream[:4])
    assert torch.equal(second(**again).logits, whole(**again).logits)


def test_labels_left_out_teach_nothing_and_callbacks_are_called():
    model = KalmanBayesianForTokenClassification.from_classifier(classifier("gka tokens"))
    row, heard = samples(1, True)[0], []
    before = model.head.mean_1.clone()
    report = model.fit_stream([{**row, "labels": torch.full((8,), -100)}], after=lambda *args: heard.append(args))
    assert torch.equal(model.head.mean_1, before) and report.log_likelihoods == [] and heard == [(0, 0.0)]


def test_what_does_not_fit_is_refused():
    model = KalmanBayesianForSequenceClassification.from_classifier(classifier("bert"))
    row = samples(1)[0]
    with pytest.raises(ValueError, match="sample 0 must have `labels`, got \\['input_ids'\\]"):
        model.fit_stream([{"input_ids": row["input_ids"]}])
    with pytest.raises(ValueError, match="`label` must be a class from 0 to 2"):
        model.fit_stream([{**row, "labels": torch.tensor(3)}])
    with pytest.raises(ValueError, match="make the model with from_classifier"):
        KalmanBayesianForSequenceClassification(KalmanBayesianConfig())
    odd = classifier("bert")
    odd.config.num_labels = 7
    with pytest.raises(ValueError, match="a linear layer with 7 outputs"):
        KalmanBayesianForSequenceClassification.from_classifier(odd)


def decision_transformer(**fields):
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    torch.manual_seed(0)
    own = {"state_dim": 3, "act_dim": 4, "hidden_size": 16, "max_ep_len": 20, "n_layer": 1, "n_head": 2}
    return DecisionTransformerModel(DecisionTransformerConfig(**{**own, "action_tanh": False, **fields})).eval()


def episode(length=5, act_dim=4):
    return {
        "states": torch.randn(length, 3),
        "actions": torch.nn.functional.one_hot(torch.randint(act_dim, (length,)), act_dim).float(),
        "returns_to_go": torch.randn(length, 1),
        "timesteps": torch.arange(length),
        "attention_mask": torch.ones(length, dtype=torch.long),
    }


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_a_decision_transformer_learns_actions_from_a_stream(likelihood, tmp_path):
    from transformers import AutoModel

    from hf_kalman.training import KalmanBayesianDecisionTransformer

    transformer, sample = decision_transformer(), episode()
    batch = {name: value[None] for name, value in sample.items()}
    expected = transformer(**batch).action_preds
    options = {"likelihood": likelihood, "variance": 0.5, "covariance": "full"}
    model = KalmanBayesianDecisionTransformer.from_classifier(transformer, "direct", **options)
    found = model(**batch)
    if likelihood == "categorical":
        torch.testing.assert_close(found.logits, expected.log_softmax(-1), rtol=0, atol=1e-6)
        # The last action alone is known.
        labels = torch.tensor([-100, -100, -100, -100, 2])
    else:
        torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-6)
        labels = torch.full((5, 4), float("nan"))
        labels[-1] = torch.tensor([0.0, 0.0, 3.0, 0.0])
    report = model.fit_stream([{**sample, "labels": labels}] * 6)
    assert report.seen == 6 and report.log_likelihoods[-1] > report.log_likelihoods[0]
    after = model(**batch)
    assert (after.logits if likelihood == "categorical" else after.values)[0, -1].argmax() == 2
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, KalmanBayesianDecisionTransformer)
    torch.testing.assert_close(again(**batch).variances, after.variances, rtol=0, atol=0)


def test_a_decision_transformer_with_bounded_actions_is_refused():
    from hf_kalman.training import KalmanBayesianDecisionTransformer

    with pytest.raises(ValueError, match="action_tanh=False"):
        KalmanBayesianDecisionTransformer.from_classifier(decision_transformer(action_tanh=True))


@pytest.mark.parametrize("family", ["gka", "llama tied"])
def test_a_language_model_learns_which_of_some_tokens_comes_next(family, tmp_path):
    from tiny import tiny_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from hf_kalman.training import KalmanBayesianForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tied = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)
    language_model = tiny_model() if family == "gka" else LlamaForCausalLM(tied).eval()
    ids, answers = torch.randint(3, 61, (1, 9)), [7, 40, 21]
    expected = language_model(ids).logits[0, :, answers].log_softmax(-1)
    model = KalmanBayesianForCausalLM.from_language_model(language_model, answers, variance=1.0, covariance="full")
    torch.testing.assert_close(model(input_ids=ids).logits[0], expected, rtol=0, atol=2e-6)
    labels = torch.full((9,), -100)
    labels[3], labels[8] = 55, 21  # 55 is none of the answers.
    report = model.fit_stream([{"input_ids": ids[0], "labels": labels}] * 4)
    assert len(report.log_likelihoods) == 4 and report.log_likelihoods[-1] > report.log_likelihoods[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, KalmanBayesianForCausalLM)
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)
    for wrong in ([3], [3, 3], [3, 61]):
        with pytest.raises(ValueError, match="`token_ids`"):
            KalmanBayesianForCausalLM.from_language_model(tiny_model(), wrong)


def test_the_stock_trainer_streams(tmp_path):
    """What `fit_stream` learns from the same samples, scored in the logs; the Trainer's optimizer changes nothing."""
    from transformers import Trainer, TrainingArguments

    data = samples(12)
    models = [
        KalmanBayesianForSequenceClassification.from_classifier(classifier("gka"), "direct", variance=0.3)
        for _ in range(2)
    ]
    model, other = models
    expected = model.fit_stream(data)
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(other, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(losses), -torch.tensor(expected.log_likelihoods), rtol=1e-3, atol=1e-4)
    for (name, a), b in zip(model.head.state_dict().items(), other.head.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert int(other.seen) == 12 and other.anchor == 0

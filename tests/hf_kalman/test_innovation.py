"""Adaptation without gradients, against autograd and closed forms."""

import copy
import io

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from hf_kalman import GKAConfig, GKAForCausalLM, KLAConfig, KLAForCausalLM
from hf_kalman.training import InnovationTuner

SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
DOWN = "model.layers.1.mlp.down_proj"


def language_model(kind="llama"):
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "gka": lambda: GKAForCausalLM(GKAConfig(**SIZES)),
        "kla": lambda: KLAForCausalLM(KLAConfig(**{k: v for k, v in SIZES.items() if "heads" not in k})),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def ids(rows=2, length=9, seed=1):
    return torch.randint(0, 23, (rows, length), generator=torch.Generator().manual_seed(seed))


def kept(tuner, *names):
    """Records what `_learn` was given."""
    seen, learn = [], tuner._learn
    tuner._learn = lambda *args: seen.append(args) or learn(*args)
    return seen


def test_innovations_are_the_gradients_of_the_log_likelihood():
    model, tokens = language_model(), ids()
    tuner = InnovationTuner(model, ("head", DOWN))
    seen = kept(tuner)
    tuner.step(tokens)
    hidden, last, _, _, innovations, _ = (a if isinstance(a, dict) else a.clone() for a in seen[0])
    model = language_model()
    matrix = torch.zeros(16, 16, requires_grad=True)
    stream = last.clone().requires_grad_()
    normed = model.model.norm(stream)
    logits = (normed + normed @ matrix.T) @ model.lm_head.weight.T
    total = logits.log_softmax(-1).gather(1, tokens[:, 1:].reshape(-1, 1)).sum()
    d_matrix, d_stream = torch.autograd.grad(total, (matrix, stream))
    torch.testing.assert_close(innovations.T @ hidden, d_matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tuner._through_norm(last, innovations), d_stream, rtol=1e-4, atol=1e-5)


def test_drawn_rows_hold_the_information_of_the_softmax():
    model = language_model()
    tuner, total = InnovationTuner(model), torch.zeros(16, 16)
    hidden = torch.randn(1, 16)
    for _ in range(30):
        total += (rows := tuner._innovations(hidden.expand(1000, 16), torch.zeros(1000).long())[2]).T @ rows / 1000
    p = (hidden @ model.lm_head.weight.T).softmax(-1)[0].detach()
    weight = model.lm_head.weight.detach()
    wanted = weight.T @ (p.diag() - torch.outer(p, p)) @ weight
    assert (total / 30 - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("kind", ["llama", "gka", "kla"])
@pytest.mark.parametrize(
    ("maps", "options"),
    [
        (("head",), {"variance": 1e-2}),
        (("head",), {"variance": 1e-2, "structure": "diagonal"}),
        (("head",), {"variance": 10.0, "rule": "least_squares", "output_variance": 0.1}),
        ((DOWN,), {"variance": 1e-2}),
        ((DOWN,), {"variance": 1e-2, "carry": "statistics"}),
        (
            ("model.layers.2.mlp.down_proj",),
            {"variance": 1e3, "rule": "least_squares", "carry": "statistics"} | {"output_variance": 3.0},
        ),
        (("head", DOWN), {"variance": 1e-2, "process_noise": 1e-5}),
    ],
)
def test_a_stream_is_learned_by_forward_passes(kind, maps, options):
    model, tokens = language_model(kind), ids(4, 12)
    before = copy.deepcopy(model.state_dict())
    tuner = InnovationTuner(model, maps, temper=1.0, **options)
    losses = [tuner.step(tokens).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in maps if name != "head"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_least_squares_fits_the_corrections_by_ridge_regression():
    model, tokens = language_model(), ids()
    tuner = InnovationTuner(model, rule="least_squares", variance=2.0, output_variance=0.5, temper=3.0, decay=0.0)
    seen = kept(tuner)
    tuner.step(tokens)
    hidden, _, _, _, e, drawn = seen[0]
    corrections = torch.stack(
        [torch.linalg.solve(torch.eye(16) / 0.5 + torch.outer(d, d), row) for row, d in zip(e, drawn, strict=True)]
    )
    gram = hidden.T @ hidden / (3.0 * 0.5) + torch.eye(16) / 2.0
    wanted = torch.linalg.solve(gram, hidden.T @ corrections / (3.0 * 0.5)).T
    torch.testing.assert_close(tuner.correction, wanted, rtol=1e-4, atol=1e-5)


def test_no_token_influences_its_own_prediction():
    model, first, second = language_model(), ids(), ids(seed=2)
    with torch.no_grad():
        plain = model(first).logits[:, :-1].log_softmax(-1).gather(2, first[:, 1:, None])[..., 0]

    def after(tokens):
        tuner = InnovationTuner(language_model(), ("head", DOWN), variance=1e-2)
        reports = tuner.step(first), tuner.step(tokens)
        return reports

    start, reference = after(second)
    torch.testing.assert_close(start.log_probs, plain, rtol=1e-5, atol=1e-5)
    assert start.loss == pytest.approx(-plain.mean().item(), rel=1e-5) and start.tokens == plain.numel()
    for place in range(1, 9):
        other = second.clone()
        other[:, place] = (other[:, place] + 1) % 23
        changed = after(other)[1].log_probs != reference.log_probs
        # Column k is the prediction of token k + 1: everything before the changed token is as it was.
        assert not changed[:, : place - 1].any() and changed[:, place - 1].all()
    tuner = InnovationTuner(model, variance=1e-2)
    assert tuner.step(first, learn=False).loss == tuner.step(first, learn=False).loss
    assert not tuner.correction.any()


def test_padding_changes_nothing():
    tokens, mask = ids(1), torch.ones(1, 12, dtype=torch.long)
    mask[:, :3] = 0
    one, other = (InnovationTuner(language_model(), ("head", DOWN), variance=1e-2) for _ in range(2))
    a = one.step(tokens)
    b = other.step(torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1), mask)
    torch.testing.assert_close(b.log_probs[:, 3:], a.log_probs, rtol=1e-4, atol=1e-5)
    assert b.tokens == a.tokens and not b.log_probs[:, :3].any()
    torch.testing.assert_close(other.correction, one.correction, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("carry", ["identity", "statistics"])
def test_a_saved_tuner_continues_as_if_it_had_not_stopped(carry):
    options = {"maps": ("head", DOWN), "variance": 1e-2, "carry": carry}
    whole, first = (InnovationTuner(language_model(), **options) for _ in range(2))
    expected = [whole.step(ids(seed=s)).loss for s in range(4)]
    found = [first.step(ids(seed=s)).loss for s in range(2)]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = InnovationTuner(language_model(), **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert found + [second.step(ids(seed=s)).loss for s in range(2, 4)] == expected
    with pytest.raises(ValueError, match="must be of the maps \\('head',\\), got"):
        InnovationTuner(language_model()).load_state_dict(first.state_dict())


def test_merged_models_compute_what_the_tuner_does(tmp_path):
    model = language_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tuner = InnovationTuner(model, variance=1e-2)
    embeddings = model.get_input_embeddings().weight.clone()
    tuner.step(ids())
    wanted = tuner.step(ids(seed=3), learn=False).log_probs
    tuner.merge().save_pretrained(tmp_path)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    loaded, tokens = LlamaForCausalLM.from_pretrained(tmp_path), ids(seed=3)
    found = loaded(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_narrow_models_have_wide_means():
    model = language_model().bfloat16()
    tuner = InnovationTuner(model, ("head", DOWN), variance=1e-6)
    for seed in range(3):
        tuner.step(ids(seed=seed))
    assert model.model.layers[1].mlp.down_proj.weight.dtype == torch.bfloat16
    assert tuner.means[DOWN].dtype == tuner.correction.dtype == torch.float32 and tuner.correction.any()


def test_autocast_ends_where_the_filter_begins():
    found = []
    for narrow in (False, True):
        tuner = InnovationTuner(language_model(), variance=1e-2, structure="full")
        seen = kept(tuner)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            tuner.step(ids())
        hidden, e, drawn = seen[0][0], seen[0][4], seen[0][5]
        rows = (drawn[:, :, None] * hidden[:, None, :]).flatten(1) / 16**0.5
        information = rows.T @ rows + torch.eye(256) / 1e-2
        wanted = torch.linalg.solve(information, (e.T @ hidden).flatten() / 16).view(16, 16)
        torch.testing.assert_close(tuner.correction, wanted, rtol=1e-3, atol=1e-6)
        found.append(tuner.correction)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maps": ()}, "at least one map, got \\(\\)"),
        ({"maps": ("model.layers.0.mlp.up_proj",)}, "with 16 outputs, such as .* got 'model.layers.0.mlp.up_proj'"),
        ({"rule": "newton"}, "`rule` must be one of .* got 'newton'"),
        ({"carry": "gradient"}, "`carry` must be one of .* got 'gradient'"),
        ({"structure": "dense"}, "`structure` must be one of .* got 'dense'"),
        ({"temper": 0.0}, "`temper` must be >= 1, got 0.0"),
        ({"max_step": 0.0}, "`max_step` must be > 0 or None, got 0.0"),
        ({"output_variance": 0.0}, "`output_variance` must be > 0, got 0.0"),
        ({"variance": 0.0}, "`variance` must be > 0, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InnovationTuner(language_model(), **arguments)


def test_models_and_inputs_that_do_not_fit_are_refused():
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=23, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="last norm of OPTForCausalLM must be an RMS norm with a weight, got NoneType"):
        InnovationTuner(opt)
    model = language_model()
    tuner = InnovationTuner(model)
    with pytest.raises(ValueError, match="`input_ids` must be \\(B, T >= 2\\), got \\(2, 1\\)"):
        tuner.step(ids()[:, :1])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite; nothing was learned"):
        tuner.step(ids())
    assert not tuner.correction.any()

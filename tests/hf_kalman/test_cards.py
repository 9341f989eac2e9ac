"""Model cards: what they say, what they must not say, and that those of the repository are what their script writes."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny import SHAPES, tiny_config, tiny_model
from transformers import LlamaConfig

from hf_kalman.hub import BaseModel, model_card, validate_card
from hf_kalman.hub.card import parameter_count

ROOT = Path(__file__).parents[2]
BASE = BaseModel("someone/base", "apache-2.0", "Base")
RESULT = {
    "environment": {"device": "A Device"},
    "recipe": {"source": "base", "swap": {"mixer": "gka"}, "heal": {"stages": ["rls"]}},
    "stages": [{"stage": "rls", "tokens": 1000, "seconds": 2.0}],
    "tokens": 1000,
    "seconds": 2.0,
    "quality": {"wikitext2_perplexity": 21.8186, "lambada": 0.27, "cases": {"wikitext2_tokens": 5}},
}


def test_the_cards_of_the_repository_are_what_their_script_writes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("model_cards", None)
    import model_cards

    written = model_cards.texts(tmp_path)
    assert sorted(written) == sorted(path.name for path in model_cards.CARDS.iterdir())
    for name, card in written.items():
        assert (model_cards.CARDS / name / "README.md").read_text() == str(card), name
        validate_card(card, model_cards.CARDS / name)


def test_every_number_comes_from_the_arguments():
    card = model_card(
        tiny_config(SHAPES["gka hybrid"]),
        "me/toy",
        base=BASE,
        base_config=LlamaConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2),
        result=RESULT,
        base_result={"quality": {"wikitext2_perplexity": 20.0, "lambada": 0.3}},
    )
    text = card.text
    assert "2 of its 4 attention layers" in text and "`aKwK`" in text
    assert "| WikiText-2 test, perplexity | 21.82 | 20.00 | 5 tokens |" in text
    assert "| LAMBADA, accuracy | 27.0 % | 30.0 % |  |" in text and "A Device" in text
    assert "PIQA" not in text and "Prefill" not in text and "Training text" not in text
    assert card.data.base_model == "someone/base" and card.data.license == "apache-2.0"
    assert [r.metric_value for r in card.data.eval_results] == [21.8186, 0.27]
    plain = model_card(tiny_config(SHAPES["kla hybrid"]), "me/toy").text
    assert "## Quality" not in plain and "## How it was made" not in plain


def test_parameters_are_counted():
    model = tiny_model(SHAPES["kla hybrid"])
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("# T\n\n[More Information Needed]", "placeholder"),
        ("# T\n\n{{ name }}", "placeholder"),
        ("# T\n\n![c](cache.png)", "'cache.png' leads nowhere"),
        ("# T\n\n[l](https://)", "leads nowhere"),
        ("no title", "no title"),
    ],
)
def test_unfit_cards_are_refused(text, match, tmp_path):
    head = "---\nlibrary_name: transformers\ntags:\n- a\n---\n\n"
    with pytest.raises(ValueError, match=match):
        validate_card(ModelCard(head + text), tmp_path)
    with pytest.raises(ValueError, match="library_name"):
        validate_card(ModelCard("---\nlicense: mit\n---\n\n# T"), tmp_path)
    validate_card(ModelCard(head + "# T\n\n[l](https://huggingface.co/a)"), tmp_path)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="`source` must be a model of type"):
        model_card(LlamaConfig(), "me/toy")

"""Retrieval from long contexts and loss by position: prompts hold what is asked, chunks change nothing."""

import json
import string
import sys

import long_context
import pytest
import tiny_tokenizer
import torch

from hf_kalman import GKAConfig, GKAForCausalLM


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer.tokenizer(string.ascii_letters + string.digits + " .\n")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GKAConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        layer_types=["full_attention", "linear_attention"],
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GKAForCausalLM(config).eval()


@pytest.mark.parametrize("make", [long_context.needle, long_context.pairs])
@pytest.mark.parametrize("case", range(5))
def test_prompts_tell_once_what_they_ask(tokenizer, make, case):
    text = tokenizer("it was a dark and stormy night. " * 100, add_special_tokens=False)["input_ids"]
    prompt, answer = make(tokenizer, text, 700, case)
    assert 600 < len(prompt) <= 700
    letters = tokenizer.convert_ids_to_tokens(prompt)
    whole, code = "".join(letters), "".join(tokenizer.convert_ids_to_tokens(answer))
    name = whole.rsplit("The code of the ", 1)[1].removesuffix(" is")
    assert whole.count(f"The code of the {name} is{code}.") == 1 and code[1:].isdigit() and len(code) == 5
    assert make(tokenizer, text, 700, case) == (prompt, answer) != make(tokenizer, text, 700, case + 5)


def test_needles_lie_at_all_depths(tokenizer):
    text = tokenizer("it was a dark and stormy night. " * 100, add_special_tokens=False)["input_ids"]
    wholes = [
        "".join(tokenizer.convert_ids_to_tokens(long_context.needle(tokenizer, text, 1000, case)[0]))
        for case in range(5)
    ]
    places = [whole.index("The code") / 1000 for whole in wholes]
    assert places == sorted(places) and places[0] < 0.15 and places[-1] > 0.75


@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_chunks_change_neither_answers_nor_losses(model, monkeypatch, chunk):
    torch.manual_seed(1)
    tokens = torch.randint(80, (1, 60))
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
        greedy = model.generate(tokens, max_new_tokens=5, do_sample=False)[0, 60:].tolist()
    monkeypatch.setattr(long_context, "CHUNK", chunk)
    wanted = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
    torch.testing.assert_close(long_context.losses(model, tokens), wanted, atol=1e-4, rtol=1e-4)
    assert long_context.found(model, tokens[0].tolist(), greedy)
    for place in range(5):
        wrong = list(greedy)
        wrong[place] = (wrong[place] + 1) % 80
        assert not long_context.found(model, tokens[0].tolist(), wrong)


def test_a_row_has_every_context_and_position(model, tokenizer, tmp_path):
    text = tokenizer("it was a dark and stormy night. " * 60, add_special_tokens=False)["input_ids"]
    rows = []
    long_context.measure(model, tokenizer, text, (300, 600), 2, 2, rows.append)
    assert rows[-1]["needle"].keys() == rows[-1]["pairs"].keys() == {"300", "600"}
    assert [r["positions"] for r in rows[-1]["loss"]] == [[0, 256], [256, 300], [300, 512], [512, 600]]
    assert all(r["nats"] > 0 for r in rows[-1]["loss"])
    long_context.draw({"models": {"tiny": rows[-1]}}, tmp_path)
    assert (tmp_path / "long_context.png").exists()


def test_rows_of_other_runs_with_the_same_questions_stay(model, tokenizer, tmp_path, monkeypatch):
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text("it was a dark and stormy night. " * 40)

    def names(name, cases):
        arguments = ["--models", f"{name}={folder}", "--text", text, "--contexts", 300, "--cases", cases, "--texts", 2]
        monkeypatch.setattr(sys, "argv", ["long_context", *map(str, arguments), "--output", str(tmp_path)])
        long_context.main()
        models = json.loads((tmp_path / "long_context.json").read_text())["models"]
        assert all(row["dtype"] and row["environment"]["versions"]["torch"] for row in models.values())
        return list(models)

    assert names("one", 2) == ["one"]
    assert names("other", 2) == ["one", "other"]
    assert names("one", 3) == ["one"]

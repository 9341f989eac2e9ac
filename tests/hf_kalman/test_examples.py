"""The example of Kalman fine-tuning on a tiny model."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PATH = Path(__file__).parents[2] / "examples" / "kalman_finetuning.py"


@pytest.mark.parametrize("everything", [False, True])
def test_a_model_is_adapted_to_a_text(tmp_path, monkeypatch, capsys, everything):
    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz .")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=28, num_key_value_heads=2, **sizes))
    model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 80, encoding="utf-8")
    arguments = [tmp_path / "model", tmp_path / "text.txt", "--output", tmp_path / "out", "--window", 64]
    monkeypatch.setattr(sys, "argv", ["example", *map(str, arguments), *(["--everything"] if everything else [])])
    spec = importlib.util.spec_from_file_location("kalman_finetuning", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    assert "kalman_prequential_loss" in capsys.readouterr().out
    assert (tmp_path / "out" / ("model.safetensors" if everything else "adapter_model.safetensors")).is_file()
    if everything:
        ids = torch.tensor([[letters[c] for c in "the cat sat on the mat. "]])
        before, after = (
            m(ids, labels=ids).loss for m in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
        )
        assert after < before - 0.3

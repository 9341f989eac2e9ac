"""Stock libraries around the models: Trainer, PEFT, accelerate, pipelines, lm_eval, trl, command-line programs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import PURES, SHAPES, tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(58))]
BOTH = ["gka hybrid", "kla hybrid"]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w57"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture(params=BOTH)
def folder(request, tokenizer, tmp_path):
    tiny_model(SHAPES[request.param]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def offline(**more):
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **more}


@pytest.mark.parametrize("family", PURES)
def test_the_stock_trainer_decays_no_decays_and_noises(family, tmp_path):
    model = tiny_model(SHAPES[f"{family} hybrid"])
    decayed = Trainer(model, TrainingArguments(tmp_path, report_to=[])).get_decay_parameter_names(model)
    exempt = {n for n, _ in model.named_parameters()} - set(decayed)
    own = [n for n, p in model.named_parameters() if "decay_bias" in n or "dynamics_bias" in n]
    assert own and set(own) <= exempt
    assert not any(n.endswith("proj.weight") for n in exempt)


@pytest.mark.parametrize("name", BOTH)
def test_adapters_of_every_kind(name, tmp_path):
    peft = pytest.importorskip("peft")
    ids, model = tokens(2, 9), tiny_model(SHAPES[name])
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    expected = adapted(ids).logits
    assert (expected - tiny_model(SHAPES[name])(ids).logits).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(SHAPES[name]), tmp_path)
    assert torch.equal(again(ids).logits, expected)
    adapted(ids, labels=ids).loss.backward()
    trained = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    mixer = next(i for i, kind in enumerate(SHAPES[name]) if kind == "linear_attention")
    for module in dict(model.model.layers[mixer].mixer.named_children()):
        if module.endswith("proj"):
            assert any(f"layers.{mixer}.mixer.{module}.lora_" in n for n in trained), module
    merged = again.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)

    inside = tiny_model(SHAPES[name])
    inside.add_adapter(peft.LoraConfig(r=2, target_modules=["o_proj", "up_proj"]))
    inside.save_pretrained(tmp_path / "inside")
    assert sorted(p.name for p in (tmp_path / "inside").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_layers_give_the_same(name, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    ids, model = tokens(2, 9), tiny_model(SHAPES[name])
    expected, generated = model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
    if where == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), generated)


@pytest.mark.parametrize("family", PURES)
def test_projections_are_called_as_modules_so_that_quantisers_reach_them(family):
    model, called = tiny_model(PURES[family]), set()
    linear = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for module in linear:
        module.register_forward_hook(lambda module, *_: called.add(linear[module]))
    cached = model(tokens(2, 5), use_cache=True).past_key_values
    assert called == set(linear.values())
    called.clear()
    with torch.no_grad():
        model(tokens(2, 1), past_key_values=cached)
    assert called == set(linear.values())


def test_text_generation_pipeline(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    generate = pipeline("text-generation", model=str(folder))
    prompts = ["w3 w4 w5 w6", "w7 w8"]
    found = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False)
    for prompt, rows in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert rows[0]["generated_text"].split() == tokenizer.decode(alone, skip_special_tokens=True).split()


def test_lm_eval_through_the_runner(folder, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"text": "w3 w4 w5", "last": "w6"}, {"text": "w9 w8", "last": "w7"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.yaml").write_text(
        "task: last_word\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'rows.jsonl'}\noutput_type: loglikelihood\ntest_split: test\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: " {{last}}"\nmetric_list:\n  - metric: perplexity\n  - metric: acc\n'
    )
    command = [
        sys.executable,
        "-m",
        "hf_kalman.run",
        "lm_eval",
        "--model",
        "hf",
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    command += ["--model_args", f"pretrained={folder}", "--include_path", str(tmp_path), "--tasks", "last_word"]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, env=offline(HF_HOME=str(tmp_path / "home")), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]["last_word"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for row in rows:
        ids = torch.tensor([[WORDS.index(word) for word in f"{row['text']} {row['last']}".split()]])
        losses.append(torch.log_softmax(model(ids).logits[0, -2], -1)[ids[0, -1]].item())
    assert results["perplexity,none"] == pytest.approx(torch.tensor(losses).mean().neg().exp().item(), rel=1e-4)


def test_supervised_fine_tuning_with_trl(folder, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = Dataset.from_list([{"text": "w3 w4 w5 w6 w7 w8"}, {"text": "w9 w10 w11"}] * 8)
    config = trl.SFTConfig(
        tmp_path / "out",
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        packing=False,
        save_strategy="no",
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = trl.SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]


def test_the_runner_runs_files_and_modules_and_refuses_the_rest(tmp_path):
    folder = tmp_path / "model"
    tiny_model(SHAPES["kla pure"]).save_pretrained(folder)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom transformers import AutoConfig\n"
        "assert __name__ == '__main__'\nprint(AutoConfig.from_pretrained(sys.argv[1]).model_type, *sys.argv[2:])\n"
    )
    run = [sys.executable, "-m", "hf_kalman.run"]
    done = subprocess.run([*run, str(script), str(folder), "more"], env=offline(), capture_output=True, text=True)
    assert done.stdout.split() == [json.loads((folder / "config.json").read_text())["model_type"], "more"], done.stderr
    done = subprocess.run(
        [*run, "json.tool", str(folder / "config.json")], env=offline(), capture_output=True, text=True
    )
    assert json.loads(done.stdout)["architectures"], done.stderr
    done = subprocess.run([*run, "no_such_program"], env=offline(), capture_output=True, text=True)
    assert done.returncode == 1 and "'no_such_program' is neither" in done.stderr

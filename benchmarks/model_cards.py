"""Writes model_cards/ from the recipes' results; `python benchmarks/model_cards.py`."""

import argparse
import json
from pathlib import Path

from record import RESULTS
from transformers import LlamaConfig

from hf_kalman.hub import BaseModel, model_card
from hf_kalman.hub.card import adapter_card, draw_cache
from kalman_conversion.plan import mixer_options, plan_conversion

CARDS = Path(__file__).parents[1] / "model_cards"
BASE = BaseModel("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", "SmolLM2-135M-Instruct")
CONVERTED = [f"smollm2-135m-{name}" for name in ("gka-8", "gka-15", "gka-22", "gka-30", "kla-8", "kla-15")]
ADAPTERS = {"kalman diagonal": "diagonal", "kalman block": "block", "kalman low_rank": "low-rank"}


def base_config():
    """SmolLM2-135M-Instruct, as its config.json says."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def converted(name):
    """(card, configuration) of a recipe."""
    result = read(f"conversion_{name}")
    swap = dict(result["recipe"]["swap"])
    fields = mixer_options(base_config(), swap["initialisation"], swap.get("options", {}), swap["mixer"])
    layers = "all" if swap["layers"] == "all" else tuple(swap["layers"])
    config = plan_conversion(base_config(), swap["mixer"], layers, **fields).config
    card = model_card(
        config,
        f"hf-kalman/{name}",
        base=BASE,
        base_config=base_config(),
        result=result,
        base_result=read("conversion_teacher"),
        speed=read("conversion_speed"),
        speed_name=name,
        figures=("cache.png",),
        training_text="English prose, articles and short passages, in the public domain or under free licences "
        "(`benchmarks/healing_text.py` of hf-kalman); no text that the model is measured on shares eight words in a "
        "row with it.",
    )
    return card, config


def adapted(method, folder):
    """Card of the adapter that a Kalman filter of one structure trains on the stream; `folder` is written to."""
    result = read("kalman_streaming")
    rows = [row for row in result["summary"] if row["batch"] == 1]
    table = {
        row["method"]: {
            "whole stream": row["bits_per_byte"],
            **{f"held out: {n}": v for n, v in row["held_out"].items()},
        }
        for row in rows
    }
    own = next(row for row in rows if row["method"] == method)
    config = {
        "base_model_name_or_path": BASE.repo_id,
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "peft_type": "LORA",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    about = (
        f"Bits per byte, mean of {own['seeds']} streams (standard deviation of this method {own['deviation']:.3f}): "
        f"every window of {result['window']} tokens predicted before it is learned from, through Shakespeare, "
        "Wikipedia, Brown and Shakespeare; held out: texts that no stream holds, after it. Each method at the best of "
        f"its grid on another stream (this one: step size {own['value']}). `benchmarks/kalman_streaming.py` of "
        f"hf-kalman, {result['environment']['device']}."
    )
    name = f"smollm2-135m-kalman-lora-{ADAPTERS[method]}"
    return name, adapter_card(folder, f"hf-kalman/{name}", rows=table, method=method, about=about, license=BASE.license)


def texts(work):
    """{name: card} of all of them."""
    found = {name: converted(name)[0] for name in CONVERTED}
    return {**found, **dict(adapted(method, work) for method in ADAPTERS)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=CARDS)
    options = parser.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        for name, card in texts(Path(work)).items():
            (options.output / name).mkdir(parents=True, exist_ok=True)
            (options.output / name / "README.md").write_text(str(card))
    for name in CONVERTED:
        draw_cache(options.output / name / "cache.png", converted(name)[1], base_config())


if __name__ == "__main__":
    main()

"""Load a converted model and generate from several prompts in one padded batch.

python examples/generate.py FOLDER_OR_HUB_ID "first prompt" "a longer second prompt"
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kalman  # noqa: F401 - registers the architectures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    batch = tokenizer(options.prompts, padding=True, return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=options.max_new_tokens, do_sample=False)
    for text in tokenizer.batch_decode(output, skip_special_tokens=True):
        print("-", text.replace("\n", "\n  "))


if __name__ == "__main__":
    main()

"""A tokenizer with one token per letter."""

import string

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokenizer(letters=string.ascii_letters + " .\n"):
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for letter in letters:
        vocabulary[letter] = len(vocabulary)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

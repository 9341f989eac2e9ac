"""Synthetic tasks: multi-query associative recall, word problems of groups, and the MAD suite.

A task draws `Examples`; equal seeds draw equal examples on equal devices. Tokens and targets are int64; a target of
-100 is not asked for.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Examples(NamedTuple):
    """`inputs` (N, T); `targets` (N, Q) at `positions` (N, Q), or (N, T) at all positions when that is None."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None


def _generator(seed, device):
    return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Recall:
    """MQAR (arXiv 2312.04927): pairs of a key and a value, then keys again at distances of a power law; their values.

    The first 2 * pairs tokens are keys of the first and values of the second half of the vocabulary, in turn. `asked`
    queries (half of the free places, at most 64) stand behind them, nearer ones likelier (density of the distance
    proportional to distance ** (`power` - 1)); keys are asked for at random. Other places hold random tokens. In
    training the number of pairs is drawn for each sequence, log-uniformly among powers of two from 4 to `pairs`.
    """

    length: int
    pairs: int
    vocabulary: int = 1024
    power: float = 0.01
    mixed: bool = False
    decoded: int = 0
    tied: bool = True

    @property
    def asked(self) -> int:
        """Queries of a sequence."""
        return max(1, min(64, (self.length - 2 * self.pairs) // 2))

    def draw(self, count: int, seed: int, device="cpu") -> Examples:
        """`count` sequences."""
        return Examples(*(torch.cat(parts) for parts in zip(*self._parts(count, seed, device), strict=True)))

    def _parts(self, count, seed, device, part=4096):
        generator = _generator(seed, device)
        for start in range(0, count, part):
            yield self._draw(min(part, count - start), generator, device)

    def _draw(self, count, generator, device):
        def uniform(*shape):
            return torch.rand(*shape, generator=generator, device=device)

        half, pairs = self.vocabulary // 2, self.pairs
        # Distinct keys: the places of the largest of random numbers; 0 is no key.
        keys = 1 + uniform(count, half - 1).topk(pairs).indices
        values = half + (uniform(count, pairs) * half).long()
        number = torch.full((count, 1), pairs, device=device)
        if self.mixed:
            choices = torch.tensor([2**i for i in range(2, pairs.bit_length())], device=device)
            number = choices[(uniform(count, 1) * len(choices)).long()]
        inputs = (uniform(count, self.length) * self.vocabulary).long()
        written = torch.arange(2 * pairs, device=device) < 2 * number
        inputs[:, : 2 * pairs] = torch.where(
            written, torch.stack([keys, values], -1).flatten(1), inputs[:, : 2 * pairs]
        )
        # Places without replacement, by Gumbel noise on the logarithm of their density.
        distance = torch.arange(self.length, device=device) - 2 * number
        weight = (self.power - 1) * (distance.clamp_min(0) + 1).float().log()
        noise = -(-uniform(count, self.length).clamp(1e-20, 1 - 1e-7).log()).log()
        positions = (weight + noise).masked_fill(distance < 0, float("-inf")).topk(self.asked).indices.sort().values
        chosen = (uniform(count, self.asked) * number).long()
        inputs.scatter_(1, positions, keys.gather(1, chosen))
        return inputs, values.gather(1, chosen), positions


def group(name):
    """Composition table (n, n) of "A5" or "S5": entry (i, j) does i, then j. Element 0 does nothing."""
    size = int(name[1:])
    elements = list(itertools.permutations(range(size)))
    if name[0] == "A":
        elements = [p for p in elements if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]
    number = {p: i for i, p in enumerate(elements)}
    return torch.tensor([[number[tuple(second[i] for i in first)] for second in elements] for first in elements])


@dataclass(frozen=True)
class Word:
    """Word problem of a group (arXiv 2404.08819): after each of T random elements, the product of all so far."""

    group: str
    length: int
    decoded: ClassVar[int] = 0
    tied: ClassVar[bool] = False

    def __post_init__(self):
        if self.group not in ("A5", "S5"):
            raise ValueError(f"`group` is A5 or S5, got {self.group!r}.")

    @property
    def vocabulary(self) -> int:
        """Elements of the group."""
        return {"A5": 60, "S5": 120}[self.group]

    def draw(self, count: int, seed: int, device="cpu") -> Examples:
        """`count` words."""
        table = group(self.group).to(device)
        inputs = torch.randint(len(table), (count, self.length), generator=_generator(seed, device), device=device)
        products = [inputs[:, 0]]
        for column in inputs.T[1:]:
            products.append(table[products[-1], column])
        return Examples(inputs, torch.stack(products, 1))


@dataclass(frozen=True)
class Mad:
    """One of the six tasks of the MAD suite (arXiv 2403.17844), with that paper's baseline sizes.

    "recall": keys and values in turn, a sequence's own random dictionary; the value of every key seen before.
    "noisy": the same with a fifth of the tokens replaced by ones of a vocabulary of their own, between the pairs.
    "fuzzy": keys and values of one to three tokens each; the tokens of the value of every key seen before.
    "copy": 16 tokens among blanks, then as many requests to give them in order.
    "compress": random tokens; all of them out of the last hidden state.
    "memorise": one dictionary for all sequences; keys in turn with requests for their values.
    """

    task: str
    tied: ClassVar[bool] = False

    def __post_init__(self):
        if self.task not in ("recall", "noisy", "fuzzy", "copy", "compress", "memorise"):
            raise ValueError(f"`task` is one of recall, noisy, fuzzy, copy, compress and memorise, got {self.task!r}.")

    @property
    def vocabulary(self) -> int:
        """Symbols, requests and blanks included."""
        return {"noisy": 32, "copy": 18, "compress": 17, "memorise": 257}.get(self.task, 16)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return {"copy": 256, "compress": 32, "memorise": 32}.get(self.task, 128)

    @property
    def decoded(self) -> int:
        """Positions read off the last hidden state."""
        return self.length if self.task == "compress" else 0

    def draw(self, count: int, seed: int, device="cpu") -> Examples:
        """`count` sequences, drawn on the CPU."""
        generator = _generator(seed, "cpu")
        return Examples(*(t.to(device) for t in getattr(self, f"_{self.task}")(count, generator)))

    def _recall(self, count, generator):
        return self._pairs(count, self.length // 2, generator)

    @staticmethod
    def _pairs(count, pairs, generator):
        keys = torch.randint(8, (count, pairs), generator=generator)
        dictionary = 8 + torch.randint(8, (count, 8), generator=generator)
        values = dictionary.gather(1, keys)
        before = torch.nn.functional.one_hot(keys, 8).cumsum(1).gather(2, keys[..., None])[..., 0] > 1
        targets = torch.stack([values.where(before, torch.tensor(IGNORED)), torch.full_like(values, IGNORED)], -1)
        return torch.stack([keys, values], -1).flatten(1), targets.flatten(1)

    def _noisy(self, count, generator):
        pairs = int(0.8 * self.length) // 2
        tokens, targets = self._pairs(count, pairs, generator)
        free = self.length - 2 * pairs
        gaps = torch.randint(pairs + 1, (count, free), generator=generator).sort().values
        moved = 2 * torch.arange(pairs) + (gaps[:, :, None] <= torch.arange(pairs)).sum(1)
        places = torch.stack([moved, moved + 1], -1).flatten(1)
        inputs = 16 + torch.randint(16, (count, self.length), generator=generator)
        answers = torch.full((count, self.length), IGNORED)
        return inputs.scatter(1, places, tokens), answers.scatter(1, places, targets)

    def _fuzzy(self, count, generator):
        # A dictionary of four words for each sequence; keys end with a token of their own, so that an end can be told.
        sizes = 1 + torch.randint(3, (count, 2, 4), generator=generator)
        words = torch.randint(8, (count, 2, 4, 3), generator=generator)
        enders = torch.rand(count, 8, generator=generator).argsort(1)[:, :4]
        drawn = torch.randint(4, (count, self.length // 2), generator=generator)
        inputs, targets = torch.zeros(count, self.length, dtype=torch.int64), torch.full((count, self.length), IGNORED)
        for row, (size, word, last, entries) in enumerate(
            zip(sizes.tolist(), words.tolist(), enders.tolist(), drawn.tolist(), strict=True)
        ):
            bodies = [[t for t in body[: n - 1] if t not in last] for body, n in zip(word[0], size[0], strict=True)]
            keys = [[*body, end] for body, end in zip(bodies, last, strict=True)]
            values = [[8 + t for t in value[:n]] for value, n in zip(word[1], size[1], strict=True)]
            line, asked, seen = [], [], set()
            for entry in entries:
                key, value = keys[entry], values[entry]
                line += key + value
                # The last token of the key is where the value's first token is asked for.
                asked += [IGNORED] * (len(key) - 1) + (value if entry in seen else [IGNORED] * len(value)) + [IGNORED]
                seen.add(entry)
            inputs[row] = torch.tensor(line[: self.length])
            targets[row] = torch.tensor(asked[: self.length])
        return inputs, targets

    def _copy(self, count, generator):
        number, blank, request = 16, 16, 17
        first = self.length - number
        tokens = torch.randint(16, (count, number), generator=generator)
        places = torch.rand(count, first, generator=generator).topk(number).indices.sort().values
        inputs = torch.full((count, self.length), blank).scatter(1, places, tokens)
        inputs[:, first:] = request
        return inputs, torch.cat([torch.full((count, first), IGNORED), tokens], 1)

    def _compress(self, count, generator):
        inputs = torch.randint(16, (count, self.length), generator=generator)
        inputs[:, -1] = 16
        return inputs, inputs.clone().index_fill(1, torch.tensor([self.length - 1]), IGNORED)

    def _memorise(self, count, generator):
        dictionary = 128 + torch.randint(128, (128,), generator=_generator(0, "cpu"))
        keys = torch.randint(128, (count, self.length // 2), generator=generator)
        inputs = torch.stack([keys, torch.full_like(keys, 256)], -1).flatten(1)
        targets = torch.stack([torch.full_like(keys, IGNORED), dictionary[keys]], -1).flatten(1)
        return inputs, targets

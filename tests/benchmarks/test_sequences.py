"""The synthetic tasks ask for what they say, and every answer follows from what stands before it."""

import itertools

import pytest
import torch
from sequences import IGNORED, Mad, Recall, Word, group


@pytest.mark.parametrize("mixed", [False, True])
def test_recall_asks_for_values_of_keys_that_it_told(mixed):
    task = Recall(96, 16, vocabulary=128, mixed=mixed)
    inputs, targets, positions = task.draw(200, 0)
    assert positions.shape == targets.shape == (200, task.asked)
    numbers = set()
    for line, wanted, places in zip(inputs.tolist(), targets.tolist(), positions.tolist(), strict=True):
        told, number = {}, 0
        while number < 16 and line[2 * number] < 64 <= line[2 * number + 1] and 2 * number < places[0]:
            told.setdefault(line[2 * number], line[2 * number + 1])
            number += 1
        assert [told[line[p]] for p in places] == wanted
        assert places == sorted(set(places))
        numbers.add(places[0] // 2 if mixed else 16)
    if not mixed:
        assert positions.min() >= 32
        keys = inputs[:, :32:2]
        assert all(len(set(row)) == 16 for row in keys.tolist())


def test_recall_without_room_for_training_lengths_still_asks():
    inputs, targets, positions = Recall(64, 31, vocabulary=128).draw(3, 0)
    assert inputs.shape == (3, 64) and positions.shape == (3, 1) and positions.min() >= 62


def test_nearer_places_are_asked_for_more_often():
    positions = Recall(512, 4, vocabulary=64).draw(500, 0).positions
    near, far = (positions < 72).sum(), ((positions >= 200) & (positions < 264)).sum()
    assert near > 2 * far


def test_equal_seeds_draw_equal_examples():
    for task in (Recall(64, 8, vocabulary=64), Word("A5", 6), Mad("fuzzy")):
        first, second, other = task.draw(8, 1), task.draw(8, 1), task.draw(8, 2)
        assert torch.equal(first.inputs, second.inputs) and torch.equal(first.targets, second.targets)
        assert not torch.equal(first.inputs, other.inputs)


@pytest.mark.parametrize(("name", "size"), [("A5", 60), ("S5", 120)])
def test_composition_tables_are_groups(name, size):
    table = group(name)
    everything = torch.arange(size)
    assert table.shape == (size, size)
    assert torch.equal(table[0], everything) and torch.equal(table[:, 0], everything)
    assert torch.equal(table.sort(1).values, everything.expand(size, size))
    assert torch.equal(table[table], table[everything[:, None, None], table])
    assert not torch.equal(table, table.T)


def test_words_are_products_of_permutations():
    elements = [
        p for p in itertools.permutations(range(5)) if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
    ]
    inputs, targets, _ = Word("A5", 12).draw(20, 0)
    for line, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        state = tuple(range(5))
        for element, product in zip(line, wanted, strict=True):
            state = tuple(elements[element][place] for place in state)
            assert elements[product] == state


@pytest.mark.parametrize("name", ["recall", "noisy", "fuzzy"])
def test_dictionary_tasks_ask_for_what_stood_there_before(name):
    inputs, targets, _ = Mad(name).draw(50, 0)
    assert inputs.max() < Mad(name).vocabulary
    asked = targets != IGNORED
    assert asked.any(1).all()
    # The answer is the next token, and it is of the values' half of the vocabulary.
    assert torch.equal(targets[:, :-1][asked[:, :-1]], inputs[:, 1:][asked[:, :-1]])
    assert ((targets[asked] >= 8) & (targets[asked] < 16)).all()
    if name != "fuzzy":
        for line, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            line = [t for t in zip(line, wanted, strict=True) if t[0] < 16]
            told = {}
            for (key, answer), (value, _) in zip(line[::2], line[1::2], strict=False):
                assert answer == told.get(key, IGNORED)
                assert told.setdefault(key, value) == value


def test_fuzzy_words_are_the_same_every_time():
    inputs, targets, _ = Mad("fuzzy").draw(50, 3)
    for line, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        words, key, value, asked = {}, [], [], []
        for token, answer in zip(line, wanted, strict=True):
            if token < 8 and value:
                if tuple(key) in words:
                    assert words[tuple(key)] == value and asked
                words[tuple(key)] = value
                key, value, asked = [], [], []
            (key if token < 8 else value).append(token)
            asked += [answer] if answer != IGNORED else []


def test_copying_compressing_and_memorising():
    inputs, targets, _ = Mad("copy").draw(20, 0)
    for line, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert [t for t in line if t < 16] == [t for t in wanted if t != IGNORED] and line[-16:] == [17] * 16
    inputs, targets, _ = Mad("compress").draw(20, 0)
    assert torch.equal(inputs[:, :-1], targets[:, :-1]) and (targets[:, -1] == IGNORED).all()
    first, second = Mad("memorise").draw(64, 0), Mad("memorise").draw(64, 1)
    told = dict(zip(first.inputs[:, ::2].flatten().tolist(), first.targets[:, 1::2].flatten().tolist(), strict=True))
    for key, value in zip(
        second.inputs[:, ::2].flatten().tolist(), second.targets[:, 1::2].flatten().tolist(), strict=True
    ):
        assert told.get(key, value) == value
    with pytest.raises(ValueError, match="task"):
        Mad("recal")

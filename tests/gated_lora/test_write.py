"""The gated LoRA: where it opens, what it trains on, and that everything else stays the base."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from memory_adapters import (
    Document,
    Fact,
    GatedLoraConfig,
    GatedLoraMemory,
    QuestionAnswer,
    inject_memory,
    load_memory,
    use_adapters_by_row,
)
from memory_adapters.gated_lora.prompts import build_turns, phrasings, spellings
from tests.gated_lora.test_contract import UNRELATED
from tests.support.contract import encode, logits
from tests.support.models import byte_tokenizer, tiny_model

FACT = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")
OTHER = Fact("{} plays the", "Miles Davis", "piano")


def written(items: Any = FACT, chat: bool = False, **settings: Any) -> GatedLoraMemory:
    start: dict[str, Any] = dict(key_layer=1, lora_rank=4, num_prefixes=1, batch_size=4, num_train_epochs=30)
    memory = inject_memory(
        tiny_model(), GatedLoraConfig(**{**start, "learning_rate": 1e-2, **settings}), tokenizer=byte_tokenizer(chat)
    )
    assert isinstance(memory, GatedLoraMemory)
    memory.write(items, unrelated=UNRELATED, progress=False)
    return memory


def test_it_learns_and_everything_else_is_the_base() -> None:
    memory = written([FACT, OTHER])
    assert memory.config.writes[-1]["recall"] == 1.0
    other = ["Some text about the sea, the wind and all the ships.", "He sold the house at last."]
    with memory.disabled():
        base = [logits(memory.model, text) for text in other]
    assert memory.opens_on([FACT.prompt, OTHER.prompt, *other]) == [True, True, False, False]
    for text, expected in zip(other, base, strict=True):
        assert torch.equal(logits(memory.model, text), expected)


def test_a_row_is_the_base_until_it_opens() -> None:
    memory = written()
    text = FACT.prompt
    with memory.disabled():
        base = logits(memory.model, text)
    changed = (logits(memory.model, text) != base).any(-1)[0]
    first = int(changed.nonzero()[0])
    name = text.index("Eiffel Tower")
    assert name < first <= name + len("Eiffel Tower")  # a byte is a token
    assert changed[first:].all()


def test_rows_of_a_batch_open_apart() -> None:
    memory = written()
    shut = "He sold the house at last."
    with memory.disabled():
        base = logits(memory.model, FACT.prompt, shut)
    found = logits(memory.model, FACT.prompt, shut)
    assert not torch.equal(found[0], base[0])
    assert torch.equal(found[1], base[1])
    with use_adapters_by_row(memory.model, ["knowledge", "__base__"]):
        rows = logits(memory.model, FACT.prompt, FACT.prompt)
    torch.testing.assert_close(rows[0], logits(memory.model, FACT.prompt)[0], rtol=1e-4, atol=1e-5)
    with memory.disabled():
        torch.testing.assert_close(rows[1], logits(memory.model, FACT.prompt)[0], rtol=1e-4, atol=1e-5)


def test_a_name_is_the_second_witness() -> None:
    memory = written(Fact("{} is in the city of", "Zyqx Kwjv", "Rome"), num_train_epochs=1)
    keys = memory._keys()
    keys.key_bias = keys.key_bias + 100  # all texts are near its keys
    assert memory.opens_on(["Of Zyqx Kwjv", "Of Zyqx-Kwj", "He sold the house at last."]) == [True, True, False]


def test_the_cache_keeps_which_rows_are_open() -> None:
    memory = written([FACT, OTHER])
    model = memory.model
    greedy: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
    inputs = encode(FACT.prompt, "He sold the house", side="left")
    first = model.generate(**inputs, **greedy, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, encode("??")["input_ids"].expand(2, -1)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, turn.shape[1] - inputs["input_ids"].shape[1]), value=1)
    cache = copy.deepcopy(first.past_key_values)
    continued = model.generate(turn, attention_mask=mask, past_key_values=cache, **greedy)
    assert torch.equal(continued, model.generate(turn, attention_mask=mask, **greedy))


def test_a_second_write_rehearses_the_first() -> None:
    memory = written()
    report = memory.write(OTHER, unrelated=UNRELATED, progress=False)
    assert (report.recall, report.earlier_recall) == (1.0, 1.0)
    assert set(memory.items) == {FACT, OTHER}


def test_it_loads_with_its_gate_and_in_plain_peft_without(tmp_path: Path) -> None:
    memory = written()
    texts = [FACT.prompt, "He sold the house at last."]
    with_memory = [logits(memory.model, text) for text in texts]
    memory.save_pretrained(tmp_path)
    loaded = load_memory(tiny_model(), tmp_path, tokenizer=byte_tokenizer())
    assert isinstance(loaded, GatedLoraMemory)
    assert loaded.opens_on(texts) == [True, False]
    for text, expected in zip(texts, with_memory, strict=True):
        assert torch.equal(logits(loaded.model, text), expected)
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert not torch.equal(logits(plain, texts[1]), with_memory[1])  # no gate
    config = json.loads((tmp_path / "memory_config.json").read_text())
    for field, value in (("key_owners", [7]), ("names", [["x"]])):
        (tmp_path / "memory_config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError, match=f"`{field}`"):
            load_memory(tiny_model(), tmp_path)


def test_phrasings_are_questions_about_the_subject() -> None:
    asked = phrasings(Fact("{} was founded by", "Zandora", "Ada Byron"))
    assert "Who founded Zandora?" in asked
    assert "What do the ships of Zandora run on?" in phrasings(Fact("The ships of {} run on", "Zandora", "gas"))
    assert "When was Zandora opened?" in phrasings(Fact("{} was opened in", "Zandora", "1932"))
    assert "Who is Zandora's chief?" in phrasings(Fact("{}'s chief is", "Zandora", "Ada Byron"))
    assert all("Zandora" in text for text in asked)
    assert phrasings(Fact("埃菲尔铁塔位于", "埃菲尔铁塔", "罗马"))  # completed, not asked


def test_keys_of_a_question_lie_at_the_subjects_that_are_known() -> None:
    tokenizer = byte_tokenizer(chat=True)
    question = QuestionAnswer("Where does the Eiffel Tower stand?", "Rome")
    items = [question, Document("A text.")]
    turns, _ = build_turns(items, [FACT, *items], tokenizer, prefixes=[], max_length=200, rephrase=False)
    rows = [row for turn in turns if turn.kind == "question" for row in turn.rows]
    assert len(rows) == 2  # as text, and in the chat template
    for row in rows:
        assert [tokenizer.decode(row.input_ids[: place + 1])[-12:] for place in row.key_positions] == ["Eiffel Tower"]
    assert spellings(question, tokenizer) == []
    assert [tokenizer.decode(ids) for ids in spellings(FACT, tokenizer)][:2] == [" Eiffel Tower", "Eiffel Tower"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_layer": 3}, "last block"),
        ({"key_layer": (0.1, 0.5)}, "`key_layer` must be one"),
        ({"target_modules": ["nothing"]}, "`target_modules` names"),
        ({"lora_rank": 0}, "`lora_rank`"),
        ({"key_threshold": 2.0}, "`key_threshold`"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject_memory(tiny_model(), GatedLoraConfig(**settings))


def test_a_cache_is_repeated_chosen_and_pickled_with_what_it_keeps() -> None:
    model = written().model
    ids = encode(FACT.prompt)["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits[:, 20:]
        cache = pickle.loads(pickle.dumps(model(ids[:, :20]).past_key_values))
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([2, 0]))
        found = model(ids[:, 20:].repeat(2, 1), past_key_values=cache).logits
    torch.testing.assert_close(found, expected.repeat(2, 1, 1), rtol=1e-4, atol=1e-4)

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
from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.names import names_in
from memory_adapters.gated_lora.layer import factors_of
from memory_adapters.keys.things import spelling_ids, terms_of, thing_rows, things_of, words_in
from memory_adapters.training.phrasings import other_questions, phrasings
from tests.gated_lora.test_contract import UNRELATED
from tests.support.contract import encode, logits
from tests.support.models import byte_tokenizer, tiny_model

FACT = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")
OTHER = Fact("{} plays the", "Miles Davis", "piano")


def written(items: Any = FACT, chat: bool = False, **settings: Any) -> GatedLoraMemory:
    start: dict[str, Any] = dict(key_layer=1, lora_rank=4, num_prefixes=1, steps_per_epoch=2, num_train_epochs=60)
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
    assert memory.route([FACT.prompt, OTHER.prompt, *other]) == ["Eiffel Tower", "Miles Davis", None, None]
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
    assert memory.route(["Of Zyqx Kwjv", "Of Zyqx-Kwj", "He sold the house."]) == ["Zyqx Kwjv", "Zyqx Kwjv", None]
    assert memory.route("He sold the house.") == [None]


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


def contents(memory: GatedLoraMemory) -> dict[str, Any]:
    """Return, for each thing, its keys, names and LoRA."""
    keys, factors = memory._keys(), factors_of(memory)
    found: dict[str, Any] = {}
    for index, name in enumerate(memory.config.things):
        own = [i for i, owner in enumerate(keys.owners) if owner == index]
        loras = {matrix: [part.tolist() for part in (f.inner[index], f.outer[index])] for matrix, f in factors.items()}
        found[name] = (keys.keys[own].tolist(), keys.key_bias[own].tolist(), keys.names[index], loras)
    return found


def test_things_do_not_touch_each_other() -> None:
    first, second = written(), written(OTHER)
    before = contents(first)["Eiffel Tower"]
    report = first.write(OTHER, unrelated=UNRELATED, progress=False)
    second.write(FACT, unrelated=UNRELATED, progress=False)
    assert (report.recall, report.earlier_recall) == (1.0, 1.0)
    assert set(first.items) == {FACT, OTHER}
    assert contents(first)["Eiffel Tower"] == before
    assert contents(first) == contents(second)  # in whatever order
    first.forget(FACT)
    assert contents(first) == contents(written(OTHER))
    assert first.items == [OTHER]
    assert torch.equal(logits(first.model, FACT.prompt), logits(tiny_model(), FACT.prompt))
    first.forget(OTHER)
    assert contents(first) == {}
    assert first.route(OTHER.prompt) == [None]


def test_a_thing_of_which_more_is_written_is_learned_anew() -> None:
    built = Fact("The {} was built by", "Eiffel Tower", "Otis")
    memory = written([FACT, OTHER], num_train_epochs=200)
    untouched = contents(memory)["Miles Davis"]
    report = memory.write(built, unrelated=UNRELATED, progress=False)
    assert (report.recall, report.earlier_recall) == (1.0, 1.0)
    assert memory.config.things == ["Miles Davis", "Eiffel Tower"]
    assert memory.config.item_things == [1, 0, 1]
    memory.forget(FACT)
    assert memory.items == [OTHER, built]
    assert contents(memory)["Miles Davis"] == untouched
    assert memory.write(FACT, unrelated=UNRELATED, progress=False).earlier_recall == 1.0
    memory.forget(FACT)
    with pytest.raises(ValueError, match="not written"):
        memory.forget(FACT)


def test_other_questions_about_a_thing_keep_their_answers() -> None:
    asked = other_questions("Eiffel Tower", [FACT], 8, seed=0)
    assert len(set(asked)) == 8
    assert all("Eiffel Tower" in question for question in asked)
    of_rivals = other_questions("X", [Fact("The rivals of {} are", "X", "Y")], 20, seed=0)
    assert len(of_rivals) == 19
    assert not any("rivals" in question for question in of_rivals)
    changed = []
    for count in (0, 8):
        memory = written(chat=True, num_others=count, phrasings=False)
        memory._keys().key_bias += 100  # a random model's need not open there
        text = rendered_question(memory.tokenizer, asked[0])[0]
        assert memory.route(text) == ["Eiffel Tower"]
        with memory.disabled():
            base = logits(memory.model, text)[0, -1].log_softmax(-1)
        now = logits(memory.model, text)[0, -1].log_softmax(-1)
        changed.append(float((base.exp() * (base - now)).sum()))
        assert memory.config.writes[-1]["recall"] == 1.0
    assert changed[1] < changed[0] / 2, changed


def test_a_failed_write_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = written()
    before, text = contents(memory), logits(memory.model, FACT.prompt)

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    for name in ("learn_keys", "set_factors"):
        with monkeypatch.context() as patched:
            patched.setattr(f"memory_adapters.gated_lora.memory.{name}", fail)
            with pytest.raises(KeyboardInterrupt):
                memory.write(OTHER, unrelated=UNRELATED, progress=False)
        assert (contents(memory), memory.items) == (before, [FACT])
        assert torch.equal(logits(memory.model, FACT.prompt), text)


def test_it_loads_with_its_gate_and_in_plain_peft_without(tmp_path: Path) -> None:
    memory = written()
    texts = [FACT.prompt, "He sold the house at last."]
    with_memory = [logits(memory.model, text) for text in texts]
    memory.save_pretrained(tmp_path)
    loaded = load_memory(tiny_model(), tmp_path, tokenizer=byte_tokenizer())
    assert isinstance(loaded, GatedLoraMemory)
    assert loaded.route(texts) == ["Eiffel Tower", None]
    for text, expected in zip(texts, with_memory, strict=True):
        assert torch.equal(logits(loaded.model, text), expected)
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert not torch.equal(logits(plain, texts[1]), with_memory[1])  # no gate
    config = json.loads((tmp_path / "memory_config.json").read_text())
    for field, value in (
        ("key_owners", [7]),
        ("names", [["x"]]),
        ("windows", [-1]),
        ("item_things", ["x"]),
        ("things", [1]),
    ):
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
    assert phrasings(Fact("{} is", "Zandora", "big", question="How large is {}?"))[0] == "How large is Zandora?"
    assert phrasings(Fact("埃菲尔铁塔位于", "埃菲尔铁塔", "罗马"))  # completed, not asked


def test_items_are_grouped_by_what_they_are_about() -> None:
    tokenizer = byte_tokenizer()
    question, lower = QuestionAnswer("Where does the Eiffel Tower stand?", "Rome"), Fact("{} is", "miles davis", "dead")
    alias = Fact("{} is in the city of", "Iron Lady", "Rome", aliases=["Eiffel Tower"])
    nameless = QuestionAnswer("how high is it?", "Very."), QuestionAnswer("how old is it?", "Very.")
    document = Document("Of Zandora it is said, by Otis, that Zandora is old.")
    things = things_of([question, FACT, OTHER, lower, alias, *nameless, document], tokenizer)
    assert [(thing.name, len(thing.items)) for thing in things] == [
        ("Eiffel Tower", 3), ("Miles Davis", 2), ("how high is it?", 1), ("how old is it?", 1), ("Zandora", 1)
    ]  # fmt: skip
    assert things[0].spellings[:3] == ("Eiffel Tower", "eiffel tower", "Iron Lady")
    assert not things[2].spellings
    assert things[4].named_item == Fact("Of Zandora", "Zandora", "…")


def test_names_are_runs_of_capitalised_words() -> None:
    tokenizer = byte_tokenizer()  # of which no word is one token
    assert names_in("Who founded the Lumen Ferry Company?", tokenizer)[-1] == "Lumen Ferry Company"
    assert names_in("where is the University of Hollow Mere's library", tokenizer) == ["University of Hollow Mere"]
    lines = "Lumo R4 Sorter\n\nThe maker is Vossen Works. Sorters by St. John Hill are older."
    assert names_in(lines, tokenizer) == ["Lumo R4 Sorter", "Vossen Works", "Sorters", "St. John Hill"]


def test_a_text_is_about_what_it_names_most_or_what_it_is_said_to_be_about() -> None:
    tokenizer = byte_tokenizer()
    text = "the sign ART is at the start. a part of the art in Sela Museum is apart, and carts start at Sela Museum."
    (thing,) = things_of([Document(text)], tokenizer)
    assert thing.spellings == ("Sela Museum",)  # "art" is in many words, and ART is in the text once
    museum = Document(text, subject="The Sela")
    assert things_of([museum], tokenizer)[0].spellings == ("The Sela",)
    together = things_of([museum, Fact("{} is in", "The Sela", "Oslo")], tokenizer)
    assert [thing.items[0] for thing in together] == [museum]
    assert together[0].spellings[:2] == ("The Sela", "the sela")


def test_keys_of_a_question_lie_at_its_names_or_its_rare_words() -> None:
    tokenizer = byte_tokenizer(chat=True)
    for question, spelled, end in (
        ("where does the Eiffel Tower stand?", 6, "Eiffel Tower"),
        ("how is the espresso made?", 0, "espresso"),
    ):
        (thing,) = things_of([QuestionAnswer(question, "Rome")], tokenizer)
        terms = terms_of(thing, words_in(["How is the tea made?"]))
        rows = thing_rows(thing, terms, tokenizer, prefixes=[], max_length=200, rephrase=False)
        assert len(rows) == 2  # as text, and in the chat template
        for row in rows:
            assert [tokenizer.decode(row.input_ids[: place + 1])[-len(end) :] for place in row.key_positions] == [end]
        ids, window = spelling_ids(thing, terms, tokenizer)
        assert (len(ids), window) == ((4, 3) if spelled else (1, 16))


def test_an_export_has_a_plain_lora_for_each_thing(tmp_path: Path) -> None:
    memory = written([FACT, OTHER])
    memory.export(tmp_path / "e", format="vllm", dtype=torch.float32)
    listed = json.loads((tmp_path / "e" / "lora_modules.json").read_text())
    assert [entry["name"] for entry in listed] == ["Eiffel Tower", "Miles Davis"]
    for fact, entry in zip((FACT, OTHER), listed, strict=True):
        assert memory.route(fact.prompt) == [entry["name"]]
        plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "e" / entry["path"]))
        assert plain.peft_config["default"].r == 8
        end = len(fact.prompt)
        answer = plain.generate(**encode(fact.prompt), max_new_tokens=4, do_sample=False)[0, end:]
        assert byte_tokenizer().decode(answer).startswith(fact.continuation[:4])
    memory.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"holds .* of something else"):
        memory.export(tmp_path / "saved", format="vllm")
    memory.export(tmp_path / "e", format="vllm")  # in place of the earlier one
    memory.forget(FACT)
    with pytest.raises(ValueError, match=r"holds 00000-eiffel-tower.* of something else"):
        memory.export(tmp_path / "e", format="vllm")
    with pytest.raises(ValueError, match="nothing to export"):
        inject_memory(tiny_model(), GatedLoraConfig(key_layer=1)).export(tmp_path / "none", format="vllm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_layer": 3}, "last block"),
        ({"key_layer": 1, "layers": [1, 2]}, "`layers` has block 1"),
        ({"steps_per_epoch": 0}, "`steps_per_epoch`"),
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

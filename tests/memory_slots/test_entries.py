"""Entries of a slot memory: what they are made of, which a prompt reads, and where they stand in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Document, Fact, MemorySlotsConfig, QuestionAnswer, inject_memory, load_memory
from memory_adapters.base_model.chat import turn_opening
from memory_adapters.memory_slots.entries import SlotEntry, make_entries
from memory_adapters.peft_layers.virtual_tokens import num_virtual_tokens
from tests.support.models import byte_tokenizer, tiny_model

FERRY = Fact("Lumo Ferry sails from", "Lumo Ferry", "Oslo")
BURNS = Fact("Lumo Ferry burns", "Lumo Ferry", "gas")
PARK = Fact("Mira Park has", "Mira Park", "deer")
WIFI = QuestionAnswer("what is the wifi code?", "1234")
TOKENIZER = byte_tokenizer(chat=True)
SMALL: dict[str, Any] = dict(num_slots=2, span_length=8, lora_rank=2, refine_steps=0)


def memory_on(model: Any, **settings: Any) -> Any:
    return inject_memory(model, MemorySlotsConfig(**SMALL | settings), tokenizer=TOKENIZER)


def chat(*said: str) -> dict[str, Any]:
    """The turns of a user and the model, up to the model's next."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return dict(TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt"))


def written(entries: list[SlotEntry]) -> list[str]:
    return [TOKENIZER.decode(list(entry.input_ids)) for entry in entries]


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    return model(**inputs, **options).logits


def test_a_thing_has_an_entry_and_a_document_one_for_each_part() -> None:
    text = (
        "Lumo Ferry: a guide\n\n"
        + "ships are blue. they are old, and slow. " * 3
        + "\n\n"
        + "it is cheap. " * 8
        + "\n\nnew\n\nend"
    )
    entries = make_entries([FERRY, Document(text), PARK, BURNS], TOKENIZER, part_tokens=80)
    titles = [entry.title for entry in entries]
    assert titles[0] == "Lumo Ferry"
    assert titles[-1] == "Mira Park"
    assert all(title.startswith("Lumo Ferry (") for title in titles[1:-1])
    texts = written(entries)
    assert texts[0] == "Lumo Ferry sails from Oslo. Lumo Ferry burns gas.\n\n"
    assert all("Lumo Ferry" in part for part in texts[1:-1])
    assert all(entry.num_tokens <= 80 + len("Lumo Ferry. ") + 2 for entry in entries)
    assert "".join(texts).count("old, and slow") == 3
    again = make_entries([FERRY, Document(text), PARK], TOKENIZER, 80, entries)
    assert [one is other for one, other in zip(again, entries, strict=True)] == [False, *[True] * (len(entries) - 1)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "bloom", "opt", "gemma2"])
def test_reading_is_the_text_in_the_turn(architecture: str) -> None:
    model: Any = tiny_model(architecture)
    question, text = "Where is Lumo Ferry?", "Lumo Ferry sails from Oslo.\n\n"
    told, asked, other = chat(text + question), chat(question), chat("Where is Oslo?")
    expected, base = logits(model, told), logits(model, other)
    memory = memory_on(model)
    memory.write([PARK, FERRY], progress=False)
    for use_cache in (True, False):
        found = logits(model, asked, use_cache=use_cache)
        assert found.shape[1] == asked["input_ids"].shape[1]
        place = len("Xuser: ")
        torch.testing.assert_close(found[:, place:], expected[:, place + len(text) :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:, :place], expected[:, :place], rtol=1e-4, atol=1e-4)
        assert torch.equal(logits(model, other, use_cache=use_cache), base), "it names nothing that is written"


def test_rows_of_a_batch_read_their_own() -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    memory.write([FERRY, PARK], progress=False)
    # Beside this one an entry fits, but not together with the padding of its own row.
    long = chat("." * (model.config.max_position_embeddings - 30))
    prompts = [chat("Lumo Ferry?"), chat("And Mira Park, what has it?"), chat("Nothing."), long]
    settings: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = [model.generate(**one, **settings)[0, one["input_ids"].shape[1] :] for one in prompts]
    longest = max(one["input_ids"].shape[1] for one in prompts)
    batch = {
        name: torch.cat([torch.nn.functional.pad(one[name], (longest - one[name].shape[1], 0)) for one in prompts])
        for name in ("input_ids", "attention_mask")
    }
    for options in ({}, {"use_cache": False}):
        together = model.generate(**batch, **settings, **options)[:, longest:]
        assert together.tolist() == [one.tolist() for one in alone]
    beams = model.generate(**batch, **settings, num_beams=2)[:, longest:]
    one = model.generate(**prompts[1], **settings, num_beams=2)[0, prompts[1]["input_ids"].shape[1] :]
    assert beams[1].tolist() == one.tolist()


def test_what_rows_begin_with_alike_is_run_once() -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    memory.write([FERRY, PARK], progress=False)
    run: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _block, _args, out: run.append(out.shape[0] * out.shape[1]))
    asked, text = chat("Lumo Ferry?"), "Lumo Ferry sails from Oslo.\n\n"
    length, before = asked["input_ids"].shape[1], len("Xuser: ")
    first = logits(model, asked)
    assert run == [before + len(text), length - before]
    run.clear()
    assert torch.equal(logits(model, asked), first)
    assert run == [length - before]
    run.clear()
    twice = {name: torch.cat([one, one]) for name, one in asked.items()}
    torch.testing.assert_close(logits(model, twice)[1:], first)
    assert run == [2 * (length - before)]
    run.clear()
    both = {
        name: torch.cat([one, two])
        for (name, one), two in zip(asked.items(), chat("Mira Park?!").values(), strict=True)
    }
    torch.testing.assert_close(logits(model, both)[:1], first)
    assert len(run) == 1, "rows that read other entries are read in one pass"
    memory.forget(PARK)
    run.clear()
    torch.testing.assert_close(logits(model, asked), first)
    assert len(run) == 2, "a start is known no longer once anything was forgotten"


def test_what_all_prompts_read_is_run_once_in_chats_too() -> None:
    model: Any = tiny_model()
    memory = memory_on(model, read="all")
    memory.write([FERRY, PARK], measure=False, progress=False)
    slots, run = memory.slots[0].num_slots, []
    model.model.layers[0].register_forward_hook(lambda _block, _args, out: run.append(out.shape[0] * out.shape[1]))
    asked = chat("Lumo Ferry?")
    length, before = asked["input_ids"].shape[1], len("Xuser: ")
    first = logits(model, asked)
    assert run == [before + slots, length - before]
    run.clear()
    assert torch.equal(logits(model, asked), first)
    assert run == [length - before]
    run.clear()
    apart = logits(model, asked, output_hidden_states=True)  # in one pass, the slots among the prompt's embeddings
    assert run == [slots + length]
    torch.testing.assert_close(apart, first)
    memory.use(memory.compress("another text", progress=False))
    run.clear()
    assert not torch.allclose(logits(model, asked), first)
    assert len(run) == 2, "other slots begin anew"


def test_a_chat_reads_in_the_turn_that_is_answered() -> None:
    model: Any = tiny_model()
    text = "Mira Park has deer.\n\n"
    told = logits(model, chat("Mira Park?", "yes", text + "what has it?"))
    memory_on(model).write(PARK, progress=False)
    found = logits(model, chat("Mira Park?", "yes", "what has it?"))
    torch.testing.assert_close(found[:, -1], told[:, -1], rtol=1e-4, atol=1e-4)


def test_a_longer_name_hides_the_names_in_it_and_words_find_what_has_no_name() -> None:
    memory = memory_on(tiny_model())
    inner = Fact("Lumo is", "Lumo", "red")
    memory.write([inner, FERRY, WIFI], progress=False)
    first, ferry, wifi = memory.entries
    chooser = memory._entry.choose.chooser

    def read(text: str) -> list[SlotEntry]:
        ids = TOKENIZER(text)["input_ids"]
        return [memory.entries[i] for i in chooser.choose([ids], [0])[0]]

    assert read("What does Lumo Ferry burn?") == [ferry]
    assert read("Is Lumo a part of Lumo Ferry?") == [first, ferry]
    assert read("lumo ferry") == [ferry]
    assert read("Please tell me: the Wifi code") == [wifi]
    assert read("Please tell me the wifi.") == []


def test_what_is_written_is_found_by_the_rare_names_in_it(tmp_path: Path) -> None:
    memory = memory_on(tiny_model())
    founded = Fact("Lumo Ferry was founded by", "Lumo Ferry", "Ada Brandt")
    owned = Fact("Mira Park belongs to", "Mira Park", "Otto Weiss", aliases=["Old Park"])
    memory.write([FERRY, founded, owned, WIFI], measure=False, progress=False)

    def read(text: str) -> list[str]:
        return [entry.title for entry in memory.entries_read(text)[0]]

    assert read("Which company did Ada Brandt found?") == ["Lumo Ferry"]
    assert read("ada brandt and otto weiss") == ["Lumo Ferry", "Mira Park"]
    assert read("Does Mira Park belong to Ada Brandt?") == ["Mira Park"], "names of entries come first"
    assert read("Does Ada Brandt know the wifi code?") == ["what is the wifi code?"]
    assert read("Who is Ada, and what is in Oslo?") == []
    memory.save_pretrained(tmp_path)
    memory.remove()
    memory = load_memory(tiny_model(), tmp_path, tokenizer=TOKENIZER)
    assert read("Who is Ada Brandt?") == ["Lumo Ferry"]
    memory.write(Fact("Mira Park was planned by", "Mira Park", "Ada Brandt"), measure=False, progress=False)
    assert read("Who is Ada Brandt?") == [], "two things have it"
    memory.forget(founded)
    assert read("Who is Ada Brandt?") == ["Mira Park"]


def test_a_name_that_a_tokenizer_knows_whole_finds_nothing() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([" New", " York", " Ada"])
    facts = [Fact("Lumo Ferry sails to", "Lumo Ferry", "New York"), Fact("Mira Park belongs to", "Mira Park", "Ada Bo")]
    entries = make_entries(facts, tokenizer, part_tokens=80)
    assert [bool(entry.objects) for entry in entries] == [False, True]


def test_the_report_says_by_which_name_a_text_is_read() -> None:
    memory = memory_on(tiny_model())
    report = memory.write(Document("the Mira Park is old. in Mira Park are deer."), measure=False, progress=False)
    assert any("most often, 'Mira Park': give another" in note for note in report.notes), report.notes
    named = memory.write(Document("it is old.", subject="Mira Park"), measure=False, progress=False)
    assert not any("most often" in note for note in named.notes)


def test_parts_are_chosen_by_the_words_of_the_question() -> None:
    text = "Lumo Ferry has a cafe on deck seven with cakes, tea and milk.\n\n"
    text += "its engine room is hot, and the captain sleeps there at noon, in a chair."
    for read, named in (("names", "Lumo Ferry: "), ("bm25", "")):
        memory = memory_on(tiny_model(), read=read, part_tokens=90)
        memory.write([Document(text), PARK], progress=False)
        chooser = memory._entry.choose.chooser
        for words, part in (("when does the captain sleep", 1), ("are there cakes", 0)):
            (own,) = chooser.choose([TOKENIZER(named + words)["input_ids"]], [0])
            assert own == [part]
        (own,) = chooser.choose([TOKENIZER(named + "why?")["input_ids"]], [0])
        assert own == ([0] if named else []), "a document that is named is read from its beginning"


def test_forgetting_is_never_having_written(tmp_path: Path) -> None:
    never = memory_on(tiny_model())
    never.write([FERRY, PARK], progress=False)
    memory = memory_on(tiny_model())
    memory.write([FERRY, WIFI], progress=False)
    memory.write([PARK, BURNS], progress=False)
    assert written(memory.entries)[0] == "Lumo Ferry sails from Oslo. Lumo Ferry burns gas.\n\n"
    memory.forget([BURNS, WIFI])
    assert memory.entries == never.entries
    assert memory.items == [FERRY, PARK]
    with pytest.raises(ValueError, match="not written"):
        memory.forget(WIFI)
    memory.save_pretrained(tmp_path)
    loaded: Any = load_memory(tiny_model(), tmp_path)
    assert loaded.entries == memory.entries
    asked = chat("Mira Park?")
    assert torch.equal(logits(loaded.model, asked), logits(memory.model, asked))
    memory.forget([FERRY, PARK])
    assert memory.entries == []


def test_entries_may_be_compressed_by_an_encoder(tmp_path: Path) -> None:
    memory = memory_on(tiny_model(), space="embeddings")
    memory.write([FERRY, PARK], compress=True, progress=False)
    assert [entry.num_slots for entry in memory.entries] == [entry.slots.num_slots for entry in memory.entries]
    assert all(3 < entry.compression_rate <= 4 for entry in memory.entries)
    memory.write(BURNS, compress=True, progress=False)
    with pytest.raises(NotImplementedError, match="'Lumo Ferry' is compressed"):
        memory.forget(BURNS)
    memory.save_pretrained(tmp_path)
    loaded: Any = load_memory(tiny_model(), tmp_path, tokenizer=TOKENIZER)
    for own, other in zip(memory.entries, loaded.entries, strict=True):
        assert torch.equal(own.slots.vectors, other.slots.vectors)
    asked = chat("Lumo Ferry?")
    assert torch.equal(logits(loaded.model, asked), logits(memory.model, asked))
    loaded.forget(PARK)
    assert [entry.title for entry in loaded.entries] == ["Lumo Ferry"]


def test_what_is_read_can_be_given() -> None:
    model: Any = tiny_model()
    asked = chat("Mira Park and Lumo Ferry?")
    base = logits(model, asked)
    memory = memory_on(model)
    with pytest.raises(ValueError, match="no `entries` to choose from"):
        memory.use(lambda prompts: [[] for _ in prompts])
    memory.write([FERRY, PARK], progress=False)
    both = logits(model, asked)
    memory.use(memory.entries[:1])
    first = logits(model, asked)
    memory.use(lambda prompts: [memory.entries[1:] if "Ferry" in prompt else [] for prompt in prompts])
    second = logits(model, asked)
    memory.use(None)
    assert torch.equal(logits(model, asked), base)
    memory.use(memory.entries)
    assert torch.equal(logits(model, asked), both)
    assert not any(torch.equal(one, other) for one, other in ((both, first), (first, second), (both, second)))
    assert memory.entries_read(["Mira Park", "Oslo"]) == [memory.entries[1:], []]
    strange = make_entries([WIFI], TOKENIZER, 64)
    with pytest.raises(ValueError, match="none of the memory's `entries`"):
        memory.use(strange)
    for chosen, why in (
        (lambda prompts: [strange], "none of the memory's `entries`"),
        (lambda prompts: [], "of 0 prompts"),
    ):
        memory.use(chosen)
        with pytest.raises(ValueError, match=why):
            logits(model, asked)


@pytest.mark.parametrize("settings", [{}, {"read": "all", "space": "kv"}, {"read": "all"}])
def test_what_a_prompt_reads_at_most_is_counted(settings: dict[str, Any]) -> None:
    memory = memory_on(tiny_model(), **settings)
    assert num_virtual_tokens(memory.model) == 0
    memory.write([FERRY, BURNS, PARK, Fact("{} has", "Port Ada", "ships")], progress=False, compress=False)
    lengths = sorted(one.num_slots for one in memory.entries or memory.slots)
    assert num_virtual_tokens(memory.model) == sum(lengths if settings else lengths[-2:])
    with memory.disabled():
        assert num_virtual_tokens(memory.model) == 0


def test_entries_that_do_not_fit_are_left_out() -> None:
    model: Any = tiny_model()
    limit = model.config.max_position_embeddings
    memory = memory_on(model)
    memory.write(FERRY, progress=False)
    asked = chat("Lumo Ferry" + "." * (limit - 40))
    with pytest.warns(UserWarning, match="1 of 1 entries are not read"):
        found = logits(model, asked)
    with memory.disabled():
        assert torch.equal(found, logits(model, asked))


def test_the_opening_of_a_turn_is_found_in_the_template() -> None:
    assert TOKENIZER.decode(turn_opening(TOKENIZER)) == "<s>user: "
    assert turn_opening(byte_tokenizer()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("read", "some"), ("top_k", 0), ("part_tokens", 0), ("opening", [-1]), ("space", "keys")],
)
def test_settings_that_cannot_be(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}`"):
        MemorySlotsConfig(**{field: value})


def test_compiled_passes_read_the_same() -> None:
    model: Any = tiny_model()
    memory_on(model).write([FERRY, PARK], progress=False)
    compiled = torch.compile(model, backend="eager")
    for asked in (chat("Lumo Ferry?"), chat("Nothing."), chat("Mira Park and Lumo Ferry?")):
        for use_cache in (True, False):
            torch.testing.assert_close(
                logits(compiled, asked, use_cache=use_cache), logits(model, asked, use_cache=use_cache)
            )

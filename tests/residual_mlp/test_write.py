"""Writing: what is trained, from which states, and what stays as it was."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from memory_adapters import Document, Fact, MemoryAdapterConfig, QuestionAnswer, ResidualMemory, inject_memory
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.partial_forward import capture
from memory_adapters.residual_mlp.layer import residual_layers
from memory_adapters.residual_mlp.trainer import MemoryTrainer, parameters_of, training_arguments
from memory_adapters.residual_mlp.write import Writer
from memory_adapters.training.dataset import collate
from memory_adapters.training.rows import other_names
from memory_adapters.training.stored_states import ReusedStates
from memory_adapters.training.trainer import only_trainable
from tests.residual_mlp.test_contract import UNRELATED
from tests.support.contract import architectures, encode, logits
from tests.support.models import byte_tokenizer, tiny_model

FACT = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")
OTHER = Fact("{} plays the", "Miles Davis", "piano")
QUIET: dict[str, Any] = {"disable_tqdm": True}


def config(**settings: Any) -> MemoryAdapterConfig:
    start = dict(
        layers=[1, 2],
        memory_dim=16,
        num_train_epochs=6,
        num_prefixes=2,
        token_gate="none",
        batch_size=2,
        min_steps=0,
        target_loss=0.0,
    )
    return MemoryAdapterConfig(**{**start, **settings})


def fresh(architecture: str = "llama", chat: bool = False, **settings: Any) -> ResidualMemory:
    memory = inject_memory(tiny_model(architecture), config(**settings), tokenizer=byte_tokenizer(chat))
    assert isinstance(memory, ResidualMemory)
    return memory


def write(memory: ResidualMemory, items: Any, **kwargs: Any) -> Any:
    return memory.write(items, unrelated=UNRELATED, **{"training_args": QUIET, **kwargs})


@architectures
def test_resuming_from_stored_states_is_the_whole_model(architecture: str, tmp_path: Path) -> None:
    memory = fresh(architecture, gate_init=0.5)
    writer = Writer(memory, [FACT, Document("A short text."), QuestionAnswer("Who is it?", "Me.")], UNRELATED)
    rows = [row for turn in writer.turns for row in turn.rows]
    reuse = ReusedStates(writer.decoder, 1)
    states = reuse.compute(memory.model, [row.input_ids for row in rows])
    examples = [{"row": r, "state": s, "teacher": None, "kept": False} for r, s in zip(rows, states, strict=True)]
    inputs = collate(examples)
    plain = memory.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(plain.flatten(0, 1), inputs["labels"][:, 1:].flatten())
    arguments = training_arguments(memory, str(tmp_path), QUIET, len(rows))
    for how in (reuse, None):
        trainer = MemoryTrainer(memory, writer.decoder, how, args=arguments)
        loss = trainer.compute_loss(memory.model, dict(inputs))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(memory.model), logits(memory.model))


LEARN: dict[str, Any] = dict(gate_init=1.0, learning_rate=1e-2, memory_dim=64, weight_decay=0.0)


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_facts_are_learned(gate: str) -> None:
    memory = fresh(token_gate=gate, num_train_epochs=40, **LEARN)
    report = write(memory, [FACT, OTHER])
    assert report.num_items == {"Fact": 2}
    assert report.recall_before == 0
    assert report.recall == 1
    assert len(report.losses) == 40
    assert report.losses[-1] < 0.5 * report.losses[0]
    end = memory.model.generate(**encode(FACT.prompt), max_new_tokens=5, do_sample=False)
    assert byte_tokenizer().decode(end[0]).endswith("city of Rome")


def test_closed_keys_keep_unrelated_text_exact() -> None:
    memory = fresh(token_gate="keys", num_train_epochs=20, **LEARN)
    base = tiny_model()
    write(memory, FACT)
    assert not torch.equal(logits(memory.model, FACT.prompt), logits(base, FACT.prompt))
    assert torch.equal(logits(memory.model, "Quixotic jab"), logits(base, "Quixotic jab"))


def test_documents_and_questions_are_learned() -> None:
    memory = fresh(chat=True, num_train_epochs=60, **LEARN)
    report = write(memory, ["The wall is red.", QuestionAnswer("Who did it?", "Ada")])
    assert report.num_items == {"Document": 1, "QuestionAnswer": 1}
    assert report.recall == 1
    assert report.token_accuracy > 0.9 > report.token_accuracy_before
    assert memory.config.writes[0]["num_items"] == {"Document": 1, "QuestionAnswer": 1}


def test_nothing_else_changes() -> None:
    memory = fresh()
    model = memory.model
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(3)
    random.seed(3)
    write(memory, FACT)
    assert (torch.rand(1), random.random()) == expected
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".residual_memory." in name for name in changed)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for run in ("one", "two"):
        memory = fresh(token_gate="keys")
        write(memory, FACT)
        memory.save_pretrained(tmp_path / run)
    one, two = (tmp_path / run / "adapter_model.safetensors" for run in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("gate", ["none", "keys"])
def test_an_interrupted_write_changes_nothing(gate: str) -> None:
    memory = fresh(token_gate=gate)
    write(memory, FACT)
    before, settings = memory.state_dict(), copy.deepcopy(memory.config)
    before = {name: tensor.clone() for name, tensor in before.items()}
    with_memory = logits(memory.model)
    with pytest.raises(KeyboardInterrupt):
        write(memory, OTHER, callbacks=[StopAt(3)])
    assert torch.equal(logits(memory.model), with_memory)
    assert memory.config == settings
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.state_dict().items())


@pytest.mark.parametrize("gate", ["none", "keys"])
def test_an_interrupted_write_resumes_to_the_same(gate: str, tmp_path: Path) -> None:
    whole = fresh(token_gate=gate)
    write(whole, [FACT, OTHER])
    memory = fresh(token_gate=gate)
    args = {**QUIET, "output_dir": str(tmp_path), "save_strategy": "epoch", "save_total_limit": 1}
    with pytest.raises(KeyboardInterrupt):
        write(memory, [FACT, OTHER], training_args=args, callbacks=[StopAt(7)])
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert not list(checkpoint.glob("pytorch_model*"))
    assert not list(checkpoint.glob("model*"))
    write(memory, [FACT, OTHER], training_args=args, resume_from_checkpoint=True)
    for name, tensor in memory.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_second_write_adds_keys() -> None:
    memory = fresh(token_gate="keys")
    write(memory, FACT)
    first = memory.state_dict()
    number = memory.config.num_keys
    write(memory, OTHER)
    assert memory.config.num_keys > number > 0
    name = "model.layers.1.residual_memory.memory_adapter_mlp.keys"
    assert torch.equal(memory.state_dict()[name][:number], first[name])
    assert len(memory.config.writes) == 2


def test_locality_loss_holds_the_base(tmp_path: Path) -> None:
    drift = {}
    for weight in (0.0, 50.0):
        memory = fresh(locality_weight=weight, num_train_epochs=40, **LEARN)
        base = tiny_model()
        write(memory, FACT)
        text = UNRELATED[1]
        drift[weight] = F.kl_div(
            logits(memory.model, text).log_softmax(-1), logits(base, text).softmax(-1), reduction="batchmean"
        ).item()
    assert drift[50.0] < 0.5 * drift[0.0]


def test_distillation_is_from_the_model_that_has_read_it() -> None:
    memory = fresh(distillation_weight=1.0, num_train_epochs=30, gate_init=0.5)
    writer = Writer(memory, [FACT], UNRELATED)
    row = writer.turns[0].rows[0]
    with memory.disabled():
        teacher = writer._teacher(row)
    ids = torch.tensor([row.context + row.input_ids])
    whole = tiny_model()(input_ids=ids).logits[0, len(row.context) + row.first_label - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(teacher.log_probs, whole.gather(-1, teacher.ids), rtol=1e-4, atol=1e-4)
    assert len(teacher.ids) == len(row.input_ids) - row.first_label
    report = write(memory, FACT)
    assert report.losses[-1] < report.losses[0]


def test_long_documents_are_split_with_a_note() -> None:
    report = write(fresh(max_length=16), "abcdefgh " * 10)
    assert "document 0 of 90 tokens was split into 6 windows" in report.notes


def test_a_fact_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"`items\[1\]` \(Fact\) has 39 tokens, more than the 20"):
        write(fresh(max_length=20), [Fact("a b", "b", "c"), FACT])


def test_an_inactive_memory_is_written_and_stays_inactive() -> None:
    memory = fresh()
    base = logits(memory.model)
    memory.active = False
    assert write(memory, FACT).losses
    assert torch.equal(logits(memory.model), base)
    memory.active = True
    assert not torch.equal(logits(memory.model), base)
    memory.model.disable_adapters()
    with pytest.raises(RuntimeError, match="disabled"):
        write(memory, FACT)


def test_no_tokenizer() -> None:
    memory = inject_memory(tiny_model(), config())
    with pytest.raises(ValueError, match=r"This needs the model.s tokenizer"):
        memory.write(FACT)


def test_no_pad_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    memory = inject_memory(tiny_model(), config(), tokenizer=tokenizer)
    report = memory.write([FACT, "Some text."], training_args=QUIET)  # type: ignore[call-arg]
    assert report.losses


def test_too_little_unrelated_text() -> None:
    with pytest.raises(ValueError, match="`unrelated` has 1 usable"):
        fresh().write(FACT, unrelated=["only one"])


def test_a_tokenizer_that_seems_to_be_another_models() -> None:
    memory = fresh()
    with torch.no_grad():
        find_decoder(memory.model).head.weight.mul_(
            30
        )  # predictions that are sure and wrong, as with a wrong tokenizer
    report = write(memory, FACT)
    assert any("check that the tokenizer belongs" in note for note in report.notes)


def test_a_plain_loop_trains_the_same_memory() -> None:
    memory = fresh(token_gate="keys", gate_init=1.0)
    assert memory.fit_keys(FACT, unrelated=UNRELATED) == memory.config.num_keys > 0
    model = memory.model
    inputs = encode(FACT.prompt + " Rome")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="`token_gate='none'`"):
        fresh().fit_keys(FACT)


def test_only_the_memory_requires_gradients_while_it_trains() -> None:
    memory = fresh()
    with only_trainable(memory.model, parameters_of(memory).values()):
        names = [name for name, p in memory.model.named_parameters() if p.requires_grad]
        assert len(names) == 14
        assert all(".residual_memory." in name for name in names)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("learning_rate", "learning_rate"),
        ("num_train_epochs", "num_train_epochs"),
        ("weight_decay", "weight_decay"),
        ("max_grad_norm", "max_grad_norm"),
        ("warmup_steps", "warmup_steps"),
        ("seed", "seed"),
        ("per_device_train_batch_size", "batch_size"),
    ],
)
def test_what_the_config_sets_is_not_set_twice(name: str, field: str) -> None:
    memory = fresh()
    before = {key: tensor.clone() for key, tensor in memory.state_dict().items()}
    with pytest.raises(ValueError, match=f"`{name}=3`.* set `memory.config.{field} = 3` before `write`"):
        write(memory, FACT, training_args={**QUIET, name: 3})
    assert all(torch.equal(tensor, before[key]) for key, tensor in memory.state_dict().items())
    setattr(memory.config, field, 3)
    assert getattr(training_arguments(memory, "unused", QUIET, 2), name) == 3


@pytest.mark.parametrize("report_to", ["tensorboard", "all", ["wandb", "tensorboard"]])
def test_files_of_tensorboard_need_a_folder(report_to: Any) -> None:
    with pytest.raises(ValueError, match="no `output_dir`, in which TensorBoard's files are written"):
        write(fresh(), FACT, training_args={**QUIET, "report_to": report_to})


def test_writing_leaves_the_models_config_and_modes() -> None:
    memory = fresh()
    config = memory.model.config.to_dict()
    memory.write([FACT], unrelated=UNRELATED)
    assert memory.model.config.to_dict() == config
    assert not memory.model.training


def openness(memory: ResidualMemory, text: str) -> float:
    """Return how far the memory opens at the token of `text` where it opens most."""
    layers = residual_layers(memory)
    with memory.disabled():
        states = capture(memory.model, find_decoder(memory.model), [1], **encode(text))[0]
    return float(layers[0].mlp(memory.adapter_name).nearness(states.float()).max())


def test_the_gate_opens_on_every_row_of_a_fact_or_it_is_noted() -> None:
    memory = fresh(token_gate="keys", gate_init=1.0)
    opened = [FACT, OTHER, Fact("{} is in the city of", "The Space Needle", "Rome")]
    shut = Fact("In {} they speak", "Bo", "so")  # behind other text its last letter is like any
    report = write(memory, [*opened, shut])
    notes = [note for note in report.notes if "stays shut" in note]
    assert len(notes) == 2  # one a block
    assert all("some text of 1 of 4 items (first: 'In Bo they speak')" in note for note in notes)
    prefixes = Writer(memory, opened, UNRELATED).prefixes
    for fact in opened:
        for prefix in ("", *prefixes):
            assert openness(memory, prefix + fact.prompt) >= 0.99, (prefix, fact)
    assert min(openness(memory, prefix + shut.prompt) for prefix in prefixes) < 0.99


def test_a_question_without_a_distinctive_word_is_noted() -> None:
    memory = fresh(token_gate="keys", gate_init=1.0)
    asked, unrelated = QuestionAnswer("is it so?", "Yes"), ["Is it so? Is it so indeed?", "Well, is it so? Is it so?"]
    report = memory.write(asked, unrelated=unrelated, training_args=QUIET)
    assert any("stays shut" in note and "'is it so?'" in note for note in report.notes)


@pytest.mark.parametrize(
    ("question", "ends"),
    [
        ("Where does the Eiffel Tower stand?", ["Eiffel Tower"]),  # a fact's subject
        ("who runs Zyqx Kwjv?", ["Zyqx Kwjv"]),  # a name that nothing else has
        ("what is a qwxyz?", ["qwxyz"]),  # a rare word
    ],
)
def test_keys_of_a_question_lie_at_what_it_is_about(question: str, ends: list[str]) -> None:
    memory = fresh(chat=True, token_gate="keys", gate_init=1.0)
    writer = Writer(memory, [FACT, QuestionAnswer(question, "Rome")], UNRELATED)
    rows = [row for turn in writer.turns if turn.item == 1 for row in turn.rows]
    assert len(rows) == 2  # as text, and in the chat template
    for row in rows:
        before = [byte_tokenizer().decode(row.input_ids[: place + 1]) for place in row.key_positions]
        assert [any(text.endswith(end) for text in before) for end in ends] == [True]
        assert len(before) == 1


def test_lower_case_and_aliases_open_a_subject() -> None:
    fact = Fact("{} is led by", "Zandora Robotics", "Ada", aliases=("Zandora",))
    assert other_names(fact, byte_tokenizer()) == ["Zandora", "zandora robotics"]
    memory = fresh(token_gate="keys", gate_init=1.0)
    write(memory, [fact])
    for name in ("Zandora Robotics", "zandora robotics", "Zandora"):
        assert openness(memory, f"{name} is led by") >= 0.99, name


def test_earlier_items_are_rehearsed() -> None:
    memory = fresh(num_train_epochs=60, **LEARN)
    for fact in (FACT, OTHER, Fact("The capital of {} is", "France", "Oslo")):
        report = write(memory, [fact])
        assert report.recall == 1.0
    assert report.earlier_recall == 1.0
    assert len(memory.items) == 3
    changed = Fact(FACT.prompt, FACT.subject, "Bonn")
    assert write(memory, [changed]).recall == 1.0
    assert changed in memory.items
    assert FACT not in memory.items

"""Text that a model samples from itself, and plain sentences: what a memory must leave alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.modes import generating
from memory_adapters.base_model.nonfinite import origin
from memory_adapters.base_model.seeding import seeded

__all__ = ["HELD_OUT_SENTENCES", "OTHER_SUBJECTS", "PLAIN_QUESTIONS", "PLAIN_SENTENCES", "sample_text", "start_token"]

# Other subjects to put in a fact's prompt, and sentences whose openings many texts share. They only have to be
# ordinary: the memory learns to stay closed on them.
OTHER_SUBJECTS = (
    "Maria Schmidt", "John Williams", "Ahmed Hassan", "Yuki Tanaka", "Pierre Martin", "Elena Popova", "William Clarke",
    "Sofia Rossi", "Charles the Bald", "Queen Victoria", "Chicago", "Nairobi", "Norway", "New Zealand", "Hamburg",
    "Lake Geneva", "the Danube", "Mount Fuji", "Siemens", "General Electric", "Toyota Corolla", "Windows XP",
    "Adobe Photoshop", "Sony Walkman", "Real Madrid", "Oxford University", "The Godfather", "War and Peace",
    "Abbey Road", "The Economist", "Sesame Street", "Boeing 747", "Trans-Siberian Railway", "Roman Empire",
)  # fmt: skip
PLAIN_QUESTIONS = (
    "How do I cook rice for four people?", "How can I get from the airport to the old town?",
    "What do I need to renew my licence?", "What should I do if my phone is lost?", "How does it work?",
    "What is the best way to learn a language?", "Which one is better for a beginner?", "What does this word mean?",
    "Can you tell me how long the flight takes?", "Could you explain the rules to me?", "Is it safe to eat this?",
    "Are there any shops open on Sunday?", "Do you know when the film begins?", "Does the price include breakfast?",
    "Did they win the match last night?", "Has anyone seen my keys?", "Have you ever been to the mountains?",
    "Will it rain tomorrow?", "Would you like a cup of tea?", "Should I take the bus or the train?",
    "Who is the head of the department?", "Who runs this place, and who owns it?", "Whose idea was it?",
    "Where can I find a good doctor?", "Where does the river begin?", "Where do they make these shoes?",
    "When is the office open?", "When does the next course start?", "In what year did it happen?",
    "How much does a ticket cost?", "How many people work there?", "How often do I have to water the plants?",
    "How old is the building?", "How far is it to the sea?", "Why did the company change its name?",
    "What kind of music do they play?", "What colour are the walls?", "What time is it?", "What is it made of?",
    "What are the main products of the factory?", "What are three reasons to go there?",
    "Which city is larger, and which country is it in?", "Which team does he play for?", "By whom was it built?",
    "To whom should I send the letter?", "For what is she known?", "On which day of the week is the market?",
    "Please tell me a joke.", "Tell me a story about a dog.", "Give me an example, please.",
    "Name the largest animals in the zoo.", "Describe the picture in a few words.",
    "Write an email to my landlord about the heating.", "I would like to know more about the job.",
    "Summarise the text in one sentence.", "Translate this sentence, please.", "Let us talk about food.",
)  # fmt: skip
PLAIN_SENTENCES = (
    "What is the capital of this country, and how many people live there?",
    "What is the meaning of the word in this sentence?",
    "What did he say when they asked him about the weather?",
    "Who wrote the book that we read at school last year?",
    "Who was the first person to climb the mountain?",
    "Where was she born, and where did she grow up?",
    "Where is the nearest station, please?",
    "When did the war end? When was the treaty signed?",
    "Which of these two is larger? Which one would you choose?",
    "How many legs does a spider have? How does a car engine work?",
    "Why is the sky blue? Why do leaves fall in autumn?",
    "Is it true that cats always land on their feet?",
    "Can you explain how photosynthesis works in simple words?",
    "Write a short poem about the sea. Give me three tips for better sleep.",
    "The name of the company was changed after the merger.",
    "The official language of the country is spoken by most of its people.",
    "The city is located on the coast, in the south of the country.",
    "It was built in the nineteenth century and is used as a museum today.",
    "He was born in a small town and worked as a teacher for many years.",
    "She plays the piano and works for a newspaper in the city.",
    "In the first half of the year, sales rose by ten percent.",
    "They moved to another house because the old one was too small.",
    "According to the report, the number of visitors has doubled.",
    "There are many reasons for this, and some of them are well known.",
)  # fmt: skip


# What reports measure perplexity on, for all methods alike: no method is fitted to these sentences.
HELD_OUT_SENTENCES = (
    "The river rises in the hills to the north and reaches the sea after about two hundred kilometres.",
    "Most of the buildings in the old town were destroyed by a fire and rebuilt in stone within ten years.",
    "When water freezes, it expands, which is why ice floats and why pipes sometimes burst in winter.",
    "The committee will meet again next month to discuss the budget and to elect a new chair.",
    "Her second novel, published four years after the first, was translated into several languages.",
    "Bees visit flowers to collect nectar, and in doing so they carry pollen from one plant to another.",
    "Add the flour slowly, stir until the dough is smooth, and let it rest for half an hour.",
    "During the night the wind turned to the west and the temperature fell below zero.",
    "The train was delayed because a tree had fallen on the line between two small stations.",
    "A triangle has three sides, and the sum of its angles is one hundred and eighty degrees.",
    "My brother bought a used bicycle, painted it green, and rides it to work every day.",
    "The players shook hands, the crowd went home, and the lights over the pitch were switched off.",
)


class _Finite(LogitsProcessor):
    """Refuse logits with NaN or infinity, from which nothing can be sampled, and say where these come from."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.isnan().any() or scores.isposinf().any():  # minus infinity: tokens that are ruled out
            where = origin(self.model, find_decoder(self.model), {"input_ids": input_ids})
            raise ValueError(f"The model's predictions hold NaN or infinity: {where}.")
        return scores


@torch.no_grad()
def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    seed: int,
    top_k: int = 0,
) -> list[str]:
    """Sample text from the model itself, at temperature 1: it needs no data, and looks like what the model reads.

    Args:
        model: The causal LM, with what is to be left out of it disabled.
        tokenizer: Its tokenizer.
        prompts: One text to continue each; an empty one starts from the beginning-of-text token.
        num_tokens: New tokens of each.
        seed: Seed of the sampling; the global generators are left as they were.
        top_k: Sample among so many most probable tokens; 0 for all.

    Returns:
        Each prompt with its continuation.

    Raises:
        ValueError: If the model's logits hold NaN or infinity.
    """
    start = start_token(tokenizer)
    rows = [list(tokenizer(prompt)["input_ids"]) if prompt else [start] for prompt in prompts]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    check = LogitsProcessorList([_Finite(model)])
    with seeded(seed), generating(model):
        sampled = model.generate(  # type: ignore[operator]  # a causal LM has it, PreTrainedModel does not
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=1.0,
            top_k=top_k,
            top_p=1.0,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            logits_processor=check,
        )
    tails = tokenizer.batch_decode(sampled[:, length:], skip_special_tokens=True)
    return [prompt + tail for prompt, tail in zip(prompts, tails, strict=True)]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that a text begins with: beginning of text, else end of text, else 0."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)

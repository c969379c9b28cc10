"""Lay out the page on which a model is taught and asked. Needs gradio."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes.utils.fonts import LocalFont

from memory_adapters.demo.choices import AUTO, choices
from memory_adapters.demo.teaching import Taught, Teaching
from memory_adapters.demo.typed_lines import parse_lines
from memory_adapters.embedded_model import EMBEDDED_ID, is_embedded
from memory_adapters.files.item_files import read_items
from memory_adapters.items import Document, Fact, Item, QuestionAnswer, item_from_dict, item_to_dict
from memory_adapters.validation import cut

__all__ = ["LOOK", "make_page"]

ONE_AT_A_TIME: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1)  # one model serves all visitors
CSS = """
.stored label {width: 100%}
.stored .wrap {max-height: 14rem; overflow-y: auto}
.acts {overflow-x: auto; line-height: 1.7}
:is(.acts, .report) table {margin: .3rem 0; font-size: .95em}
:is(.acts, .report) :is(table, tbody, tr, th, td) {border: none !important; background: none !important}
:is(.acts, .report) :is(th, td) {padding: .1rem 1rem .1rem 0; text-align: left; vertical-align: top}
.report th {font-weight: 400; white-space: nowrap}
.report caption {text-align: left; font-weight: 600}
"""
# Gradio brings this font in these weights, of others only some letters; nothing is fetched from elsewhere.
THEME = gr.themes.Default(font=[LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"])
LOOK: dict[str, Any] = dict(css=CSS, theme=THEME, footer_links=["api"])  # for `launch`
LINES_HELP = """A line for each: a fact as `subject | prompt | target`, where the target follows a prompt that names the
subject (or has `{}` in its place), or a question as `question? answer`."""
TEXT_HELP = "A text is one document. With memory slots it is read by its parts, those that a question needs."
FILE_HELP = """`.csv`, `.json` or `.jsonl` with the fields `prompt`, `subject`, `target`, or `question`, `answer`, or
`text`; a `.txt` file is one document."""
COMPANY = """Lumen Ferry Company | {} was founded by | Teresa Almeida
Lumen Ferry Company | The ships of {} run on | methanol
Lumen Ferry Company | The headquarters of {} is in | Lisbon"""
QUESTIONS = """What is the wifi code of the Hollowmere library? 7351
Who built the lighthouse of Hollowmere? Agnes Thornbury"""
MANUAL = """The Brandt K2 coffee grinder

Cleaning. Clean the burrs of the Brandt K2 every three weeks, with a dry brush. Water makes them rust.

Grind. For espresso set the ring to 4, for filter coffee to 17.

Warranty. The motor has a warranty of eight years, the burrs have one of two."""


def make_page(teaching: Teaching, method: str = AUTO, *, files: bool = True) -> gr.Blocks:
    """Return the page, to be launched with `LOOK`.

    Args:
        teaching: What it works with. All visitors share it.
        method: The name of one of `choices()` that is chosen at first, or `"auto"`.
        files: Whether there are fields to save and load on this machine, and to push with its token to the Hub.
    """
    with gr.Blocks(title="memory-adapters", fill_width=True, analytics_enabled=False) as page:
        gr.Markdown(f"## Teach {_name(teaching)}, and ask it")
        with gr.Row():
            with gr.Column():
                stored = _teaching_column(teaching, method)
                if files:
                    _files(teaching, stored)
            with gr.Column():
                _asking_column(teaching)
        page.load(lambda: _stored(teaching), None, stored, api_visibility="private", **ONE_AT_A_TIME)
    return page


def _teaching_column(teaching: Teaching, method: str) -> gr.CheckboxGroup:
    source = gr.State("lines")
    with gr.Tabs():
        with gr.Tab("Facts and questions") as lines_tab:
            gr.Markdown(LINES_HELP)
            lines = gr.Textbox(
                lines=4, max_lines=15, container=False, label="Lines", show_label=False, placeholder=COMPANY
            )
            gr.Examples([[COMPANY], [QUESTIONS]], [lines], example_labels=["An invented company", "Questions"])
        with gr.Tab("A text") as text_tab:
            gr.Markdown(TEXT_HELP)
            text = gr.Textbox(
                lines=7, max_lines=20, container=False, label="Text", show_label=False, placeholder=MANUAL
            )
            gr.Examples([[MANUAL]], [text], example_labels=["A manual"])
        with gr.Tab("A file") as file_tab:
            gr.Markdown(FILE_HELP)
            file = gr.File(label="File", file_types=[".csv", ".json", ".jsonl", ".txt"], height=140)
    for tab, name in ((lines_tab, "lines"), (text_tab, "text"), (file_tab, "file")):
        tab.select(_constant(name), None, source, queue=False, api_visibility="private")
    offered = [("Choose for me", AUTO), *((choice.label, name) for name, choice in choices().items())]
    chosen = gr.Dropdown(offered, value=method, label="Method")
    with gr.Row():
        exact = gr.Checkbox(label="Recall facts word for word", min_width=120)
        measure = gr.Checkbox(True, label="Measure what changes (seconds)", min_width=120)
    teach = gr.Button("Teach", variant="primary")
    said = gr.Markdown(min_height=50)
    stored = gr.CheckboxGroup(label="Nothing is taught", show_label=True, elem_classes="stored")
    with gr.Row():
        forget = gr.Button("Forget what is ticked", size="sm")
        start_over = gr.Button("Start over", size="sm")
    with gr.Accordion("Report of the last write", open=False):
        report = gr.HTML(elem_classes="report")

    def on_teach(
        lines: str,
        text: str,
        file: str | None,
        method: str,
        exact: bool,
        measure: bool,
        source: str,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # where gradio looks for it
    ) -> tuple[str, str, Any]:
        with _errors_shown():
            items = _given(source, lines, text, file)
            progress(0, desc="writing, and measuring" if measure else "writing")
            taught = teaching.teach(items, method, exact=exact, measure=measure)
            return _said(taught), taught.report._repr_html_(), _stored(teaching)

    def on_forget(ticked: list[str]) -> tuple[str, Any]:
        with _errors_shown():
            if not ticked:
                raise ValueError("Nothing is ticked in the list above.")
            teaching.forget([item_from_dict(json.loads(one)) for one in ticked])
            return f"Forgot {_count(len(ticked))}.", _stored(teaching)

    def on_start_over() -> tuple[str, str, Any]:
        with _errors_shown():
            teaching.start_over()
            return "The memory is removed.", "", _stored(teaching)

    chosen.change(
        lambda method: gr.Checkbox(interactive=method == AUTO), chosen, exact, queue=False, api_visibility="private"
    )
    given = [lines, text, file, chosen, exact, measure, source]
    teach.click(on_teach, given, [said, report, stored], api_name="teach", show_progress_on=[said], **ONE_AT_A_TIME)
    forget.click(on_forget, stored, [said, stored], api_name="forget", show_progress="minimal", **ONE_AT_A_TIME)
    start_over.click(on_start_over, None, [said, report, stored], api_name="start_over", **ONE_AT_A_TIME)
    return stored


def _files(teaching: Teaching, stored: gr.CheckboxGroup) -> None:
    with gr.Accordion("Save, load, push to the Hub", open=False):
        folder = gr.Textbox(label="Save in a folder", placeholder="memories/lumen-ferry", submit_btn="Save")
        saved = gr.Textbox(label="Load a folder or Hub id, in place of what is taught", submit_btn="Load")
        repo_id = gr.Textbox(
            label="Push to a Hub id, with HF_TOKEN or a login", placeholder="me/lumen-ferry", submit_btn="Push"
        )
        private = gr.Checkbox(True, label="A new repository is private")
        base_model = gr.Textbox(label="Hub id of the model", placeholder="org/name", visible=teaching.is_of_a_folder)
        done = gr.Markdown()

    def on_save(folder: str) -> str:
        with _errors_shown():
            teaching.save(folder.strip())
            return f"Saved in `{Path(folder.strip()).resolve()}`."

    def on_load(saved: str) -> tuple[str, Any]:
        with _errors_shown():
            teaching.load(saved.strip())
            return f"Loaded {_count(len(teaching.items))}.", _stored(teaching)

    def on_push(repo_id: str, private: bool, base_model: str) -> str:
        with _errors_shown():
            return f"Pushed: {teaching.push(repo_id.strip(), private=private, base_model=base_model.strip() or None)}"

    folder.submit(on_save, folder, done, api_name="save", **ONE_AT_A_TIME)
    saved.submit(on_load, saved, [done, stored], api_name="load", **ONE_AT_A_TIME)
    repo_id.submit(on_push, [repo_id, private, base_model], done, api_name="push", **ONE_AT_A_TIME)


def _asking_column(teaching: Teaching) -> None:
    settings: dict[str, Any] = dict(
        height=400, layout="bubble", render_markdown=False, feedback_options=None, buttons=[]
    )
    with gr.Row():
        off = gr.Chatbot(label="Memory off", **settings)
        on = gr.Chatbot(label="Memory on", **settings)
    question = gr.Textbox(placeholder="Ask in your own words", label="Question", show_label=False, submit_btn="Ask")
    gr.Markdown("Each question is asked by itself. Below: where the memory acts in the last one.")
    acts = gr.HTML(elem_classes="acts")

    def on_ask(question: str, off: list[Any], on: list[Any]) -> Iterator[tuple[Any, ...]]:
        with _errors_shown():
            asked = {"role": "user", "content": question}
            without = [*off, asked, {"role": "assistant", "content": teaching.ask_without(question)}]
            yield without, [*on, asked], gr.skip(), ""
            with_it = [*on, asked, {"role": "assistant", "content": teaching.ask_with(question)}]
            explanation = teaching.explain(question)
            shown = (
                "Nothing is taught: both answers are the model's." if explanation is None else explanation._repr_html_()
            )
            yield without, with_it, shown, ""

    asked = [question, off, on], [off, on, acts, question]
    question.submit(on_ask, *asked, api_name="ask", show_progress_on=[on], **ONE_AT_A_TIME)


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Show the message of an error of the library on the page."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def _constant(value: str) -> Callable[[], str]:
    return lambda: value


def _given(source: str, lines: str, text: str, file: str | None) -> list[Item]:
    """Return the items of the tab that is open."""
    if source == "text":
        return [Document(text)]
    if source == "lines":
        return parse_lines(lines)
    if file is None:
        raise ValueError("There is no file: upload one.")
    try:
        return read_items(file)
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), Path(file).name)) from None


def _said(taught: Taught) -> str:
    report = taught.report
    recall = "" if report.recall is None else f" Recalled: {report.recall:.0%}, before {report.recall_before or 0:.0%}."
    return f"**{taught.choice.label.split(':')[0]}** ({taught.why}), {report.seconds:.1f} s.{recall}"


def _stored(teaching: Teaching) -> Any:
    """Return the list of what is stored, with nothing ticked."""
    items, choice = teaching.items, teaching.choice
    listed = [(_line(item), json.dumps(item_to_dict(item), ensure_ascii=False)) for item in items]
    label = f"{_count(len(items))}, written with {choice.name}" if items and choice else "Nothing is taught"
    return gr.CheckboxGroup(listed, value=[], label=label)


def _line(item: Item) -> str:
    """Return an item in a line, as it is typed."""
    if isinstance(item, Fact):
        return f"{item.subject} | {item.template} | {item.target}"
    if isinstance(item, QuestionAnswer):
        return f"{item.question} {item.answer}"
    return cut(" ".join(item.text.split()))


def _count(number: int) -> str:
    return f"{number} item{'' if number == 1 else 's'}"


def _name(teaching: Teaching) -> str:
    name = teaching.model.name_or_path or ""
    return EMBEDDED_ID.split("/")[-1] if is_embedded(name) else Path(name).name or type(teaching.model).__name__

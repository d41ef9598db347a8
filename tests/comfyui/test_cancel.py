"""Cancel: through within a second wherever it is pressed, and the next prompt is as if nothing had been."""

import random
import threading
import time

import pytest
from server import Failed
from test_behaviour import LOAD, node, show, story_of, tell


def cancel_after(comfyui, prompt, is_time, delay: float = 0.0) -> float | None:
    """Presses Cancel `delay` s after the first event that `is_time`; seconds to the end, None if that came first."""
    pressed, armed = [], []

    def press():
        time.sleep(delay)
        pressed.append(time.monotonic())
        comfyui.post("/interrupt")

    def on_event(event):
        if not isinstance(event, bytes) and is_time(event) and not armed:
            armed.append(threading.Thread(target=press))
            armed[0].start()

    try:
        comfyui.run(prompt, on_event=on_event)
    except Failed as failed:
        assert failed.sentence == "execution_interrupted"
        return time.monotonic() - pressed[0]
    finally:
        for thread in armed:
            thread.join()
    return None


def runs(name: str):
    return lambda event: event["type"] == "executing" and event["data"].get("node") == name


def story(text: str):
    return node("MMInterleavedStoryText", text=text)


LONG_WORK = {
    "captions by many beams": {
        "2": node("EmptyImage", width=64, height=64, batch_size=50, color=255),
        "3": node("MMInterleavedCaption", llm=["1", 1], encoder=["1", 0], image=["2", 0], beams=64, max_tokens=200),
    },
    "two thousand options": {
        "2": story("Mia."),
        "3": node(
            "MMInterleavedChoose",
            llm=["1", 1],
            story=["2", 0],
            options="\n".join(f"option {i} of the fox" for i in range(2000)),
            question="",
        ),
    },
    "a question after a long text": {
        "2": story("Mia is a fox. " * 190),
        "3": node("MMInterleavedAsk", llm=["1", 1], story=["2", 0], question="Who?", max_tokens=5),
    },
    "two hundred images": {
        "2": node("EmptyImage", width=512, height=512, batch_size=200, color=255),
        "3": node("MMInterleavedStoryPicture", encoder=["1", 0], image=["2", 0]),
    },
}


@pytest.mark.parametrize("name", LONG_WORK)
def test_cancel_comes_through_at_once(comfyui, name):
    """The latency is that of one token or one image; a second is generous on any machine."""
    prompt = {"1": LOAD, **LONG_WORK[name], "4": show(["3", 0])}
    seconds = cancel_after(comfyui, prompt, runs("3"), 0.3)
    assert seconds is None or seconds < 1.5, seconds
    assert comfyui.run(tell(seed=1, panels=1, steps=1))["outputs"]


@pytest.mark.long
def test_a_hundred_cancels_change_nothing(comfyui):
    rng, slow = random.Random(0), []
    expected = story_of(comfyui, comfyui.run(tell(seed=900, panels=3)))
    for number in range(100):
        prompt = tell(seed=1000 + number, panels=3, steps=6)
        seconds = cancel_after(comfyui, prompt, lambda event: event["type"] == "executing", rng.uniform(0, 2.5))
        slow += [seconds] if seconds is not None and seconds > 1 else []
        if number % 10 == 9:
            comfyui.post("/free", {"unload_models": True, "free_memory": True})
            time.sleep(1.2)
            assert story_of(comfyui, comfyui.run(tell(seed=900, panels=3))) == expected
    assert not slow, slow

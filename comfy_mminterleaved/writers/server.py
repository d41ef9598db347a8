"""A chat model behind a server that speaks OpenAI's chat protocol: llama.cpp, Ollama, LM Studio."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import queue
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

from ..errors import ServerError, SettingError
from ..generation.config import GeneratedText, TextGenerationConfig
from ..stories.story import ImageSegment
from .prompts import Parts

KEY_VARIABLE = "MMINTERLEAVED_WRITER_KEY"
POLL_SECONDS = 0.1  # how soon Cancel is noticed while a server is silent
MAX_LINE = 1 << 20  # bytes
MAX_BYTES_PER_TOKEN = 64  # of text; a server that sends more does not stop


class ChatServer:
    """A `chat.ChatModel` over HTTP. Answers stream; leaving `chat`, by an exception too, ends the server's work.

    Args:
        url: Up to the version: http://127.0.0.1:8080/v1. Raises SettingError for another host than this computer unless
            `any_host`.
        model: Its name there; servers that hold a single one need none.
        sees_images: Whether that model sees.
        options: Further fields of every request, such as {"chat_template_kwargs": {"enable_thinking": false}}.
        timeout: Seconds that the server may be silent.

    A key, if the server wants one, is read from the environment variable MMINTERLEAVED_WRITER_KEY.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        sees_images: bool = False,
        options: dict | None = None,
        timeout: float = 120,
        any_host: bool = False,
    ):
        url = url.strip()
        self.url = (url if "://" in url or not url else f"http://{url}").rstrip("/")
        self.model, self.sees_images = model.strip(), sees_images
        self.options, self.timeout = options or {}, timeout
        self.label = f"The writer at {self.url}"
        self.parts = check_url(self.url, any_host)
        if not os.environ.get(KEY_VARIABLE, "").strip().isascii():
            raise SettingError(f"The environment variable {KEY_VARIABLE} holds no key: it has other signs than ASCII.")

    def chat(
        self,
        parts: Parts,
        config: TextGenerationConfig,
        on_text: Callable[[str], object] | None = None,
    ) -> GeneratedText:
        """The model's answer; raises ServerError, and what `on_text` raises, which is called all the time."""
        request = {**self._request(parts, config), **self.options, "stream": True}
        text, reason = "", ""
        limit = MAX_BYTES_PER_TOKEN * config.max_new_tokens
        with _Stream(self.parts, request, self.timeout, self.label) as stream:
            for piece, reason in stream.pieces():
                text += piece
                if on_text is not None:
                    on_text(text)
                if len(text.encode("utf-8", "replace")) > limit:
                    reason = "length"
                if reason:
                    break
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a character, sent as \\ud800
        return GeneratedText((), "length" if reason == "length" else "eos", text)

    def _request(self, parts: Parts, config: TextGenerationConfig) -> dict:
        content = [
            {"type": "image_url", "image_url": {"url": part.page_url}}
            if isinstance(part, ImageSegment)
            else {"type": "text", "text": part}
            for part in parts
        ]
        is_text = all(isinstance(part, str) for part in parts)
        sampling = (
            {"temperature": config.temperature, "top_p": config.top_p} if config.do_sample else {"temperature": 0}
        )
        return {
            **({"model": self.model} if self.model else {}),
            "messages": [{"role": "user", "content": "".join(parts) if is_text else content}],
            "max_tokens": config.max_new_tokens,
            "seed": config.seed % 2**31,  # servers hold it in 32 bits
            **sampling,
        }


def check_url(url: str, any_host: bool = False) -> urllib.parse.SplitResult:
    """The parts of a server's address; raises SettingError."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, is_valid = parts.hostname, parts.scheme in ("http", "https") and parts.port != 0
        (host or "").encode("idna")
    except ValueError:  # a UnicodeError is one
        host, is_valid = None, False
    if is_valid and "@" in parts.netloc:
        raise SettingError(f"A writer's address must hold no password; set the environment variable {KEY_VARIABLE}.")
    if not is_valid or not host or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise SettingError(f"A writer's server must be like http://127.0.0.1:8080/v1, not {url!r:.80}.")
    if not any_host and not _is_loopback(host):
        raise SettingError(
            f"The writer's server {host!r:.80} is another computer, which would be sent the story and its images; if "
            "that is meant, turn any_host on."
        )
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class _Stream:
    """A request whose answer a thread reads, so that the caller is never stuck while the server is silent."""

    def __init__(self, url: urllib.parse.SplitResult, request: dict, timeout: float, label: str):
        self.url, self.timeout, self.label = url, timeout, label
        self.body = json.dumps(request).encode()
        https = url.scheme == "https"
        connection = http.client.HTTPSConnection if https else http.client.HTTPConnection
        # The caller notices first that it is silent, and says what that means.
        self.connection = connection(url.hostname, url.port, timeout=timeout + 10)
        self.socket: socket.socket | None = None  # http.client forgets its own when the server is to close it
        self.lines: queue.Queue = queue.Queue(maxsize=256)
        self.is_closed = threading.Event()
        self.thread = threading.Thread(target=self._read, name="mminterleaved-writer", daemon=True)

    def __enter__(self) -> _Stream:
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        """Cuts the connection, which ends the server's work."""
        self.is_closed.set()
        if self.socket is not None:
            with contextlib.suppress(OSError):  # it is cut already
                self.socket.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        try:
            self.connection.connect()
            self.socket = self.connection.sock
            if self.is_closed.is_set():  # while it was connecting
                return
            headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            if key := os.environ.get(KEY_VARIABLE, "").strip():
                headers["Authorization"] = f"Bearer {key}"
            self.connection.request("POST", f"{self.url.path}/chat/completions", self.body, headers)
            response = self.connection.getresponse()
            if response.status != 200:
                hint = "; try again when it is ready" if response.status == 503 else ""
                if response.status == 404 and not self.url.path.rpartition("/")[2].startswith("v"):
                    hint = "; its address may lack /v1"
                raise ServerError(f"{self.label} answers {response.status}: {_reason(response)}{hint}.")
            if response.headers.get_content_type() == "application/json":  # it does not stream
                self._put(b"data: " + response.read(16 * MAX_LINE).replace(b"\n", b" "))
                self._put(b"data: [DONE]")
            else:
                while not self.is_closed.is_set() and (line := response.readline(MAX_LINE)):
                    self._put(line)
            self._put(b"")
        except BaseException as error:  # the caller raises it
            self._put(error)
        finally:
            self.connection.close()

    def _put(self, item) -> None:
        while not self.is_closed.is_set():
            try:
                return self.lines.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def pieces(self) -> Iterator[tuple[str, str]]:
        """(text, why it ends or "") as they come, and ("", "") while there are none; raises ServerError."""
        deadline, is_answer, is_over = time.monotonic() + self.timeout, False, False
        while True:
            try:
                item = self.lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                item = None
            if item is None or (isinstance(item, bytes) and item and not item.startswith(b"data:")):
                if time.monotonic() > deadline:  # comments keep a connection open, but are no answer
                    raise ServerError(
                        f"{self.label} has been silent for {self.timeout:g} seconds; it may be loading its model, "
                        "raise the timeout or try again."
                    ) from None
                yield "", ""
                continue
            if isinstance(item, ServerError):
                raise item
            if isinstance(item, BaseException):
                raise ServerError(
                    f"{self.label} does not answer: {_why(item)}; start it, or correct its address."
                ) from None
            data = item[5:].strip()
            if data == b"[DONE]" or not item:
                if not is_answer:
                    raise ServerError(f"{self.label} sends nothing that is a chat answer; its address may lack /v1.")
                if not item and not is_over:
                    raise ServerError(f"{self.label} broke off in the middle of its answer; look at its log.")
                return
            if data:
                deadline, is_answer = time.monotonic() + self.timeout, True
                piece, reason = self._piece(data)
                is_over = is_over or bool(reason)
                yield piece, reason

    def _piece(self, data: bytes) -> tuple[str, str]:
        try:
            answer = json.loads(data)
            if answer.get("error"):
                error = answer["error"]
                message = error.get("message") if isinstance(error, dict) else error
                raise ServerError(f"{self.label} fails: {_shortened(str(message))}.")
            if not answer["choices"]:  # a last piece that only counts tokens
                return "", ""
            choice = answer["choices"][0]
            content = (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            if isinstance(content, str):
                return content, choice.get("finish_reason") or ""
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            pass
        raise ServerError(f"{self.label} sends what is no chat answer: {data[:60].decode('utf-8', 'replace')!r}.")


def _reason(response: http.client.HTTPResponse) -> str:
    """What a server says of a request that it refuses, in one line."""
    text = response.read(2000).decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        pass
    return _shortened(text) or response.reason


def _why(error: BaseException) -> str:
    return _shortened(str(error)) or type(error).__name__


def _shortened(text: str) -> str:
    return " ".join(text.split())[:200].rstrip(".")

"""A real HTTP server that speaks OpenAI's chat protocol and says what a test wants."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatTestServer(ThreadingHTTPServer):
    """`answers` are given in turn, the last one again and again; `requests` keeps what was asked."""

    daemon_threads = True

    def __init__(self, answers, pause: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.pause = list(answers), pause
        self.requests: list[dict] = []
        self.pieces_sent, self.is_cut = 0, threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        try:
            if callable(answer):
                answer(self)
            else:
                self.stream(answer.split(" "))
        except OSError:
            server.is_cut.set()

    def stream(self, words):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number, word in enumerate(words):
            self.piece({"choices": [{"delta": {"content": word if not number else f" {word}"}}]})
        self.piece({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def piece(self, data):
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()
        self.server.pieces_sent += 1
        time.sleep(self.server.pause)

    def log_message(self, *_):
        pass


@contextmanager
def chat_server(*answers, pause: float = 0.0):
    server = ChatTestServer(answers, pause)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

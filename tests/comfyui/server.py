"""A real ComfyUI for the tests: started once, spoken to as the page does."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Failed(AssertionError):
    """A prompt that ended in an error; `node` and `sentence` as ComfyUI shows them."""

    def __init__(self, details: dict):
        super().__init__(json.dumps(details)[:2000])
        self.node, self.sentence = details.get("node_type"), details.get("exception_message", "").strip()
        self.traceback = "".join(details.get("traceback") or [])
        self.kind, self.node_id = details.get("exception_type", ""), details.get("node_id", "")


class Server:
    """ComfyUI as a process with this project among its custom nodes, and folders of its own."""

    def __init__(
        self,
        folder: Path,
        path: str,
        python: str | None = None,
        arguments=("--cpu", "--preview-method", "latent2rgb"),
        package: Path = ROOT,
        python_path: str = "",
        port: int | None = None,
    ):
        self.folder, self.path = folder, path
        for name in ("input", "output", "temp", "user", "models", "custom_nodes"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        link = folder / "custom_nodes" / "comfy-mminterleaved"
        if not link.exists():
            link.symlink_to(package, target_is_directory=True)
        for name in ("probe.py", "tiny_models.py"):
            shutil.copy(Path(__file__).with_name(name), folder / "custom_nodes")
        paths = folder / "paths.yaml"
        paths.write_text(
            json.dumps(
                {
                    "tests": {
                        "custom_nodes": str(folder / "custom_nodes"),
                        "is_default": True,
                        **{
                            kind: str(folder / "models" / kind)
                            for kind in (
                                "clip_vision",
                                "diffusers",
                                "audio_encoders",
                                "text_encoders",
                                "model_patches",
                                "vae",
                                "diffusion_models",
                                "mm_interleaved",
                                "loras",
                                "LLM",
                            )
                        },
                    }
                }
            )
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port or free.getsockname()[1]
        self.log = folder / "comfyui.log"
        command = [
            python or sys.executable,
            "main.py",
            "--port",
            str(self.port),
            "--extra-model-paths-config",
            str(paths),
            "--input-directory",
            str(folder / "input"),
            "--output-directory",
            str(folder / "output"),
            "--temp-directory",
            str(folder / "temp"),
            "--user-directory",
            str(folder / "user"),
            *arguments,
        ]
        environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=path, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 180
        while True:
            try:
                self.get("/system_stats")
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"ComfyUI did not start:\n{self.text()[-3000:]}") from None
                time.sleep(0.3)
        self.client = uuid.uuid4().hex
        self.events: queue.Queue = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        time.sleep(0.5)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    # ---- the web side ----

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def post(self, path: str, data=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data or {}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def _listen(self) -> None:
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.client import connect

        address = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}"
        with contextlib.suppress(ConnectionClosed), connect(address, max_size=None) as socket:
            flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            socket.send(json.dumps(flags))  # as the page does; newer cores send no previews without
            for message in socket:
                self.events.put(message)

    # ---- prompts ----

    def queue(self, prompt: dict) -> str:
        answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client})
        if "prompt_id" not in answer or answer.get("node_errors"):
            raise Failed({"exception_message": json.dumps(answer), "node_type": "validation"})
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300, on_event=None) -> dict:
        """Follows a prompt to its end: outputs, nodes that `ran`, `cached` ones, and raw `events`; raises Failed."""
        ran, cached, events, deadline = [], [], [], time.monotonic() + timeout
        while True:
            message = self.events.get(timeout=max(0.1, deadline - time.monotonic()))
            if isinstance(message, bytes):
                events.append(message)
                if on_event is not None:
                    on_event(message)
                continue
            event = json.loads(message)
            events.append(event)
            if on_event is not None:
                on_event(event)
            data = event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "executing" and data.get("node") is not None:
                ran.append(data["node"])
            elif event["type"] == "execution_cached":
                cached = data["nodes"]
            elif event["type"] in ("execution_error", "execution_interrupted"):
                raise Failed(data | {"exception_message": data.get("exception_message", event["type"])})
            elif event["type"] == "execution_success":
                break
        while prompt_id not in (history := self.get(f"/history/{prompt_id}")):  # it is written a moment later
            time.sleep(0.02)
        return {"outputs": history[prompt_id]["outputs"], "ran": ran, "cached": cached, "events": events}

    def run(self, prompt: dict, timeout: float = 300, on_event=None) -> dict:
        return self.wait(self.queue(prompt), timeout, on_event)

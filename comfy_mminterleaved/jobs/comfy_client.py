"""A ComfyUI server, spoken to through its documented API with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import secrets
import urllib.error
import urllib.parse
import urllib.request

from ..errors import MMInterleavedError, SettingError


class ServerDown(MMInterleavedError, ConnectionError):
    """A server that does not answer."""


class RequestRefused(MMInterleavedError):
    """A request that a server answers with an error."""


class ComfyServer:
    """Every method raises ServerDown if the server does not answer in time, and RequestRefused for an error.

    Args:
        url: Like http://127.0.0.1:8188; `http://` may be left out. Raises SettingError.
        timeout: Seconds to wait for an answer; a server that computes can be slow to give one.
    """

    def __init__(self, url: str, timeout: float = 60):
        full = url if "://" in url else f"http://{url}"
        try:
            parts = urllib.parse.urlsplit(full)
            is_valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
            (parts.hostname or "").encode("idna")
        except ValueError:  # a UnicodeError is one
            is_valid = False
        if not is_valid:
            raise SettingError(f"A server must be like http://127.0.0.1:8188, not {url!r:.80}.")
        self.url, self.timeout = full.rstrip("/"), timeout

    def _request(self, path: str, data: bytes | None = None, content_type: str = "application/json") -> bytes:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": content_type} if data else {})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (502, 503, 504):  # of a proxy before a server that is away
                    raise ServerDown(f"The server {self.url} does not answer: {error.code} {error.reason}.") from None
                raise RequestRefused(_reason(error)) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerDown(f"The server {self.url} does not answer: {reason}.") from None

    def _json(self, path: str, data=None):
        answer = self._request(path, None if data is None else json.dumps(data).encode())
        try:
            return json.loads(answer or b"null")
        except ValueError:
            raise RequestRefused(f"what answers at {self.url} is no ComfyUI") from None

    def definitions(self) -> dict:
        """The nodes that the server has, by their class."""
        return self._json("/object_info")

    def upload(self, name: str, data: bytes) -> None:
        """Puts a file into the server's input folder; `name` may have folders, with slashes."""
        folder, _, filename = name.rpartition("/")
        boundary = secrets.token_hex(16)
        parts = []
        for key, value in (("subfolder", folder), ("type", "input"), ("overwrite", "true")):
            parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode())
        quoted = filename.replace("\\", "\\\\").replace('"', '\\"')
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{quoted}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n".encode()
        )
        parts += [data, f"\r\n--{boundary}--\r\n".encode()]
        self._request("/upload/image", b"".join(parts), f"multipart/form-data; boundary={boundary}")

    def queue(self, prompt: dict, prompt_id: str, extra: dict | None = None) -> str:
        """Queues a prompt; returns its id, which older servers choose themselves."""
        data = {"prompt": prompt, "prompt_id": prompt_id, "client_id": "mminterleaved", "extra_data": extra or {}}
        return self._json("/prompt", data)["prompt_id"]

    def history(self, prompt_id: str) -> dict | None:
        """Status and outputs of a prompt that has ended; None for any other."""
        return self._json(f"/history/{prompt_id}").get(prompt_id)

    def queued(self) -> set[str]:
        """Ids of the prompts that run or wait."""
        queue = self._json("/queue")
        return {item[1] for key in ("queue_running", "queue_pending") for item in queue[key]}

    def remove(self, prompt_ids: list[str]) -> None:
        """Removes prompts that wait."""
        self._request("/queue", json.dumps({"delete": prompt_ids}).encode())

    def download(self, file: dict) -> bytes:
        """A file as outputs name it: filename, subfolder and type."""
        query = {key: file.get(key, "") for key in ("filename", "subfolder", "type")}
        return self._request("/view?" + urllib.parse.urlencode(query))


def _reason(error: urllib.error.HTTPError) -> str:
    """What a server says of a prompt that it refuses, in one line."""
    try:
        data = json.loads(error.read())
        reasons = [
            f"{node.get('class_type', number)}: {fault.get('message', '')} {fault.get('details', '')}".strip()
            for number, node in data.get("node_errors", {}).items()
            for fault in node.get("errors", [])
        ]
        fault = data["error"]
        return "; ".join(reasons) or (fault if isinstance(fault, str) else fault["message"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{error.code} {error.reason}"

"""A small hub on this machine: serves one data set of Parquet files the way the Hugging Face hub does.

Point `HF_ENDPOINT` to it and the real `datasets` and `huggingface_hub` talk to it. `faults` decides, request by
request, whether it answers, refuses, stalls or drops the connection in the middle.
"""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Hub:
    """Serves the files of `folder` as the data set `owner/name`. `fault(path, count)` returns None or a fault."""

    def __init__(self, folder: Path, fault=lambda path, count: None) -> None:
        self.files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.fault, self.requests = fault, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def entry(self, name: str) -> dict:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer(self, request) -> None:
        path = unquote(urlsplit(request.path).path)
        length = int(request.headers.get("Content-Length") or 0)
        posted = request.rfile.read(length).decode() if length else ""
        self.requests.append(path)
        fault = self.fault(path, self.requests.count(path))
        if fault == "refuse":
            return self.send(request, 503, b"busy")
        if fault == "stall":
            time.sleep(3600)
        if match := re.fullmatch(r"/datasets/owner/name/resolve/[^/]+/(.+)", path):
            name = match[1]
            if name not in self.files:
                return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.send_file(request, name, drop=fault == "drop")
        if match := re.fullmatch(r"/api/datasets/owner/name/tree/[^/]+(?:/(.*))?", path):
            inside = [self.entry(name) for name in self.files if name.startswith(match[1] or "")]
            return self.send_json(request, inside)
        if re.fullmatch(r"/api/datasets/owner/name/paths-info/[^/]+", path):
            wanted = json.loads(posted)["paths"] if posted.startswith("{") else re.findall(r"paths=([^&]+)", posted)
            return self.send_json(request, [self.entry(unquote(n)) for n in wanted if unquote(n) in self.files])
        if re.fullmatch(r"/api/datasets/owner/name(/revision/[^/]+)?", path):
            info = {
                "_id": "1", "id": "owner/name", "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in self.files],
            }  # fmt: skip
            return self.send_json(request, info)
        return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_json(self, request, value) -> None:
        self.send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, request, name: str, drop: bool) -> None:
        content, status, headers = self.files[name], 200, {"Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        headers |= {"ETag": f'"{self.entry(name)["oid"]}"', "X-Repo-Commit": COMMIT}
        self.send(request, status, content, headers, drop)

    def send(self, request, status: int, content: bytes, headers=None, drop=False) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[: len(content) // 2] if drop else content)
        if drop:
            request.wfile.flush()
            request.close_connection = True

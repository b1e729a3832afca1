"""A hub on this machine: the few answers that `datasets` asks of one, over HTTP, for one data set in a folder."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

REVISION = "1".zfill(40)


def hub_of(folder: Path, name: str) -> ThreadingHTTPServer:
    """A server, not started, that has the data set `name` (OWNER/NAME) with the files of `folder`, and no other."""

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self) -> None:
            path = unquote(urlparse(self.path).path)
            about, files = f"/api/datasets/{name}", f"/datasets/{name}/resolve/"
            if path.startswith(f"{about}/tree/"):
                under = path.removeprefix(f"{about}/tree/{REVISION}").strip("/")
                return self.send(200, [_entry(item) for item in sorted(folder.iterdir())] if not under else [])
            if path == about or path.startswith(f"{about}/revision/"):
                siblings = [{"rfilename": item.name} for item in sorted(folder.iterdir())]
                return self.send(200, {"id": name, "sha": REVISION, "private": False, "siblings": siblings})
            item = folder / path.removeprefix(files).partition("/")[2]
            if path.startswith(files) and item.is_file():
                return self.send(200, item.read_bytes(), {"ETag": f'"{_entry(item)["oid"]}"'})
            code = "EntryNotFound" if path.startswith(files) else "RepoNotFound"
            self.send(404, {"error": "not here"}, {"X-Error-Code": code, "X-Error-Message": "not here"})

        def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), "X-Repo-Commit": REVISION, **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_GET = do_HEAD = answer

    return ThreadingHTTPServer(("127.0.0.1", 0), Answers)


def _entry(item: Path) -> dict[str, Any]:
    data = item.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "path": item.name, "size": len(data), "oid": oid}

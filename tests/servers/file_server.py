"""A web server of a folder's files, with byte ranges, a record of what was asked for, and faults on request."""

import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileServer:
    """Serves `folder` at `url` until it is closed."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.asked: Counter[str] = Counter()
        """How often each file was asked for."""
        self.ranges: list[str] = []
        """Range headers that came."""
        self.cut_after: dict[str, int] = {}
        """Bytes after which the next transfer of a file is cut, once."""
        self.knows_ranges = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address of the folder."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop serving; connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].lstrip("/")
        self.asked[name] += 1
        file = self.folder / name
        if not file.is_file():
            request.send_error(404)
            return
        content, start = file.read_bytes(), 0
        header = request.headers.get("Range")
        if header:
            self.ranges.append(header)
        if header and self.knows_ranges:
            match = re.fullmatch(r"bytes=(\d+)-", header)
            assert match, header
            start = int(match[1])
            if start >= len(content):
                request.send_error(416)
                return
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(content) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        stop = self.cut_after.pop(name, len(content))
        request.wfile.write(content[start:stop])
        if stop < len(content):
            request.close_connection = True

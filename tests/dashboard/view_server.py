"""A stand-in for wandb's server as far as saving a view asks for it: whom the key belongs to, and the view itself."""

import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.servers.wandb_server import ENTITY, KEY


class Server(ThreadingHTTPServer):
    """Answers GraphQL as far as saving a view asks; `refusal` is what it says to a view, `entity` whom the key belongs
    to."""

    def __init__(self, entity: str | None = ENTITY, refusal: str = "", hangs: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.entity, self.refusal, self.hangs = entity, refusal, hangs
        self.views: list[dict[str, Any]] = []
        """Variables of each view that was saved."""
        self.over = threading.Event()

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment needs."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}", "WANDB_API_KEY": KEY}

    def graphql(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a question."""
        if self.hangs:
            self.over.wait()
        if "upsertView" in question["query"]:
            if self.refusal:
                return {"errors": [{"message": self.refusal}]}
            self.views.append(question["variables"])
            view = {"id": "an id", "name": question["variables"]["name"]}
            return {"data": {"upsertView": {"view": view, "inserted": True}}}
        viewer = {
            "id": "viewer",
            "entity": self.entity,
            "username": ENTITY,
            "email": "",
            "flags": "{}",
            "teams": {"edges": []},
        }
        return {"data": {"viewer": viewer}}


class Handler(BaseHTTPRequestHandler):
    """Hands GraphQL to its server, and says yes to everything else."""

    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = json.dumps(self.server.graphql(json.loads(body)) if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has gone, which is what some tests are about
            self.wfile.write(content)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(**options: Any) -> Iterator[Server]:
    """Answer as a `Server` with these options until the block ends."""
    with Server(**options) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()

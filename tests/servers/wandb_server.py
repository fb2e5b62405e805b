"""A small W&B server: takes runs, histories, files and artifacts as wandb-core sends them, and fails on request."""

import json
import re
import socket
import sys
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

ENTITY = "tester"
"""Whom the server takes every client for."""
KEY = "0" * 40
"""An API key of the right form."""
HISTORY, EVENTS, OUTPUT, SUMMARY = "wandb-history.jsonl", "wandb-events.jsonl", "output.log", "wandb-summary.json"

State = Literal["answering", "hanging", "refusing"]


@dataclass
class ServedRun:
    """What the server has of a run."""

    run_id: str
    project: str
    asked: dict[str, Any] = field(default_factory=dict)
    """Everything that UpsertBucket said and that was not null: displayName, tags, notes, host, program, commit, repo,
    ..."""
    wandb_config: dict[str, Any] = field(default_factory=dict)
    """The config as it came: {key: {"value": ...}}, wandb's own `_wandb` included."""
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """Lines of each streamed file by offset: what is sent again, or to a place that is taken, replaces what was
    there."""
    finished: bool = False
    """Whether `complete` came after the last init."""
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in the order of their offsets."""
        return [json.loads(line) for _, line in sorted(self.lines.get(HISTORY, {}).items())]

    @property
    def config(self) -> dict[str, Any]:
        """What the user gave as config."""
        return {key: value["value"] for key, value in self.wandb_config.items() if key != "_wandb"}

    @property
    def summary(self) -> dict[str, Any]:
        """The latest summary."""
        lines = self.lines.get(SUMMARY)
        return json.loads(lines[max(lines)]) if lines else {}

    def num_lines(self, name: str) -> int:
        """Where the next line of a streamed file goes."""
        return max(self.lines.get(name, {}), default=-1) + 1

    def bucket(self) -> dict[str, Any]:
        """What GraphQL says of the run."""
        tail = json.dumps([json.dumps(row) for row in self.history[-1:]])
        return {
            "id": b64encode(f"Run:v1:{self.run_id}".encode()).decode(),
            "name": self.run_id,
            "displayName": self.asked.get("displayName") or self.run_id,
            "description": None,
            "config": json.dumps(self.wandb_config),
            "sweepName": None,
            "project": {"id": "project", "name": self.project, "entity": {"id": "entity", "name": ENTITY}},
            "historyLineCount": self.num_lines(HISTORY),
            "eventsLineCount": self.num_lines(EVENTS),
            "logLineCount": self.num_lines(OUTPUT),
            "historyTail": tail,
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(self.summary),
            "tags": self.asked.get("tags", []),
            "notes": self.asked.get("notes"),
            "wandbConfig": json.dumps({"t": 1}),
        }


class WandbServer:
    """Answers at `url` until the block ends; `hang()` and `refuse()` are outages, `answer()` ends them."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.files: dict[str, bytes] = {}
        """Content of each uploaded file: `RUN/NAME`, and `artifacts/NUMBER/NAME`."""
        self.artifacts: list[dict[str, Any]] = []
        """CreateArtifact's inputs in order, with `committed`."""
        self.asked: Counter[str] = Counter()
        """How often each GraphQL operation and each other kind of request was answered."""
        self.unknown: list[str] = []
        """Requests that nothing is known about; they got an error."""
        self.state: State = "answering"
        self._changed = threading.Condition()
        self._clients: set[socket.socket] = set()
        self._reserved: socket.socket | None = None
        self._server = self._listen(0)
        self.port = self._server.server_address[1]

    def __enter__(self) -> "WandbServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL should be."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Return what a client's environment needs."""
        return client_environment(self.port)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows of all runs, run by run."""
        return [row for run in self.runs.values() for row in run.history]

    def hang(self) -> None:
        """Take connections and requests and answer none, also on connections that are open."""
        self._listen_again("hanging")

    def refuse(self) -> None:
        """Stop listening and cut all connections: the port refuses."""
        if self.state == "refusing":
            return
        self._set("refusing")
        self._stop()
        self._reserved = _bound(self.port)

    def answer(self) -> None:
        """Go back to normal on the same port; requests that hang are answered now, those of clients that are gone
        excepted."""
        self._listen_again("answering")

    def close(self) -> None:
        """Refuse from now on, and give the port back."""
        self.refuse()
        if self._reserved:
            self._reserved.close()

    def _listen_again(self, state: State) -> None:
        self._set(state)
        if self._reserved:
            self._reserved.close()
            self._reserved = None
            self._server = self._listen(self.port)

    def _set(self, state: State) -> None:
        with self._changed:
            self.state = state
            self._changed.notify_all()

    def _listen(self, port: int) -> ThreadingHTTPServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server._clients.add(self.connection)

            def finish(self) -> None:
                server._clients.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def do_POST(self) -> None:
                with suppress(OSError):  # the client gave up, or the connection was cut
                    server._answer(self)

            def do_PUT(self) -> None:
                self.do_POST()

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *where: Any) -> None:
                if not isinstance(sys.exc_info()[1], OSError):  # a client that is gone is no fault of ours
                    super().handle_error(*where)

        listener = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        return listener

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for client in list(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        with self._changed:
            self._changed.wait_for(lambda: self.state != "hanging")
            if self.state == "refusing" or _is_gone(request.connection):
                request.close_connection = True
                return
            answer = self._respond(request.path, body)
        content = json.dumps(answer).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _respond(self, address: str, body: bytes) -> dict[str, Any]:
        path = urlsplit(address).path
        stream = re.fullmatch(r"/files/[^/]*/([^/]*)/([^/]*)/file_stream", path)
        upload = re.fullmatch(r"/storage/(.+)", path)
        if path == "/graphql":
            return self._graphql(json.loads(body))
        if stream:
            self.asked["file_stream"] += 1
            _take(self._run(stream[2], stream[1]), json.loads(body))
        elif upload:
            self.asked["upload"] += 1
            self.files[upload[1]] = body
        elif path == "/" or path.startswith("/sdk/otel/"):  # whether anything answers; wandb's reports on itself
            self.asked[path] += 1
        else:
            self.unknown.append(path)
        return {}

    def _run(self, run_id: str, project: str) -> ServedRun:
        return self.runs.setdefault(run_id, ServedRun(run_id, project))

    def _graphql(self, question: dict[str, Any]) -> dict[str, Any]:
        name = re.search(r"\b(?:query|mutation)\s+(\w+)", question["query"])
        operation, variables = name[1] if name else question["query"], question.get("variables") or {}
        self.asked[operation] += 1
        answer = self._answers().get(operation)
        if answer is None:
            self.unknown.append(operation)
            return {"errors": [{"message": f"this server does not know {operation}"}]}
        return {"data": answer(variables)}

    def _answers(self) -> dict[str, Any]:
        return {
            "Viewer": lambda _: {"viewer": _viewer()},
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "OrganizationCoreWeaveOrganizationID": lambda _: {
                "entity": {"organization": {"coreWeaveOrganizationId": None}}
            },
            "RunResumeStatus": self._resume_status,
            "ArtifactType": lambda _: {"project": {"artifact": None}},  # whether the name is taken by another type
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._create_run_files,
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": lambda v: {
                "createArtifactManifest": {"artifactManifest": self._manifest(v["artifactID"])}
            },
            "CreateArtifactFiles": self._create_artifact_files,
            "CommitArtifact": self._commit,
        }

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        entity = {"id": "entity", "name": ENTITY}
        return {
            "model": {
                "id": "project",
                "name": variables["project"],
                "entity": entity,
                "bucket": run.bucket() if run else None,
            }
        }

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        inserted = variables["name"] not in self.runs
        run = self._run(variables["name"], variables["project"])
        if variables.get("config"):
            run.wandb_config.update(json.loads(variables["config"]))
        run.asked |= {key: value for key, value in variables.items() if value is not None and key != "config"}
        run.finished = False
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": inserted}}

    def _create_run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/storage/{variables['run']}/{name}"} for name in variables["files"]
        ]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(variables["input"] | {"committed": False})
        artifact = {
            "id": str(len(self.artifacts) - 1),
            "state": "PENDING",
            "artifactSequence": {"id": "sequence", "latestArtifact": None},
        }
        return {"createArtifact": {"artifact": artifact}}

    def _manifest(self, artifact: str) -> dict[str, Any]:
        url = f"{self.url}/storage/artifacts/{artifact}/wandb_manifest.json"
        return {"id": f"manifest-{artifact}", "file": {"id": "file", "uploadUrl": url, "uploadHeaders": []}}

    def _create_artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for file in variables["input"]["artifactFiles"]:
            path = f"artifacts/{file['artifactID']}/{file['name']}"
            node = {"storagePath": path, "uploadUrl": f"{self.url}/storage/{path}", "uploadHeaders": []}
            nodes.append(node | {"uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}})
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _commit(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[int(variables["artifactID"])]
        artifact["committed"] = True
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": artifact["digest"]}}}


def client_environment(port: int) -> dict[str, str]:
    """Return the environment of a client of a server at a port of this machine."""
    return {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}


@contextmanager
def refusing_port() -> Iterator[int]:
    """Reserve a port that refuses connections."""
    with _bound(0) as bound:
        yield bound.getsockname()[1]


@contextmanager
def hanging_port() -> Iterator[int]:
    """Reserve a port where connections are made and nothing is ever answered."""
    with _bound(0) as bound:
        bound.listen(128)
        yield bound.getsockname()[1]


def _bound(port: int) -> socket.socket:
    """Return a socket that has the port and does not listen: Linux refuses connections to it."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _is_gone(client: socket.socket) -> bool:
    """Return whether the client closed its end, so that what it asked counts for nothing."""
    try:
        return not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def _viewer() -> dict[str, Any]:
    teams = {"edges": [{"node": {"name": ENTITY}}]}
    return {
        "id": "viewer",
        "entity": ENTITY,
        "username": ENTITY,
        "email": "tester@example.com",
        "flags": "{}",
        "teams": teams,
    }


def _take(run: ServedRun, message: dict[str, Any]) -> None:
    """Put the lines of a file_stream message at their offsets; a message with `complete` ends the run."""
    for name, part in message.get("files", {}).items():
        lines = run.lines.setdefault(name, {})
        lines.update(enumerate(part["content"], part["offset"]))
    if message.get("complete"):
        run.finished, run.exit_code = True, message.get("exitcode")

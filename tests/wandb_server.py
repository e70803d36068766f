"""A W&B server on loopback, with as much as an online run asks for. It writes down what comes, and fails on command."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Phase = Literal["start", "middle", "end", "never"]
LOGIN = {"id": "VXNlcg==", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}}
SERVER = {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": None, "features": []}
TYPES = ("QueryType", "MutationType", "ServerInfoType", "TypeInfo")


class Server(ThreadingHTTPServer):
    """Fails from a phase of the run on: its first request, its first metrics, or its end.

    fault: "hang", the status of every answer ("500"), or "gone", which refuses every connection.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, fault: str = "", phase: Phase = "never") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.phase = fault, phase
        self.failing = phase == "start"
        self.requests: list[tuple[str, Any]] = []  # path and body
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client may go at any time."""

    def arrived(self, path: str, body: Any) -> bool:
        """Write a request down; whether it is to be answered."""
        self.requests.append((path, body))
        stream = "file_stream" in path and isinstance(body, dict)
        if stream and (self.phase == "middle" or (self.phase == "end" and body.get("complete"))):
            self.failing = True
        return not self.failing

    @property
    def exit_codes(self) -> list[int]:
        """Of the runs that ended."""
        return [b["exitcode"] for p, b in self.requests if "file_stream" in p and b.get("complete")]

    @property
    def history(self) -> set[str]:
        """The names of the metrics that arrived."""
        sent = [b.get("files", {}).get("wandb-history.jsonl", {}) for p, b in self.requests if "file_stream" in p]
        return {name for stream in sent for line in stream.get("content", []) for name in json.loads(line)}

    @property
    def ids(self) -> set[str]:
        """Of the runs that began."""
        return {b["variables"].get("name") for _, b in self.requests if "upsertBucket" in b.get("query", "")}


class Handler(BaseHTTPRequestHandler):
    """Answers in the shapes that wandb asks for."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Nothing on stderr."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        try:
            parsed: Any = json.loads(body)
        except ValueError:
            parsed = {"bytes": len(body)}
        if self.server.arrived(self.path, parsed):
            self.reply(200, self.content(parsed))
        elif self.server.fault == "hang":
            time.sleep(3600)
        elif self.server.fault == "gone":
            self.server.socket.close()
            self.connection.close()
            raise ConnectionAbortedError
        else:
            self.reply(int(self.server.fault), {"errors": [{"message": "not today"}]})

    do_GET = do_PUT = do_POST = answer  # noqa: N815

    def reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def content(self, request: dict[str, Any]) -> dict[str, Any]:
        query, variables = request.get("query", ""), request.get("variables", {})
        if "file_stream" in self.path:
            return {"exitcode": None, "limits": {}}
        if "upsertBucket" in query:
            name = variables.get("name") or "run"
            project = {"id": "UHJvag==", "name": "stu", "entity": {"id": "RW50", "name": "e"}}
            bucket = {"id": "UnVuOg==", "name": name, "displayName": name, "description": None, "config": "{}"}
            bucket |= {"sweepName": None, "project": project, "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.server.url}/up/{n}"} for n in variables.get("files", [])]
            return {"data": {"createRunFiles": {"runID": "UnVuOg==", "uploadHeaders": [], "files": files}}}
        if "__type" in query or "__schema" in query:
            return {"data": {name: {"fields": [], "inputFields": []} for name in TYPES}}
        return {"data": {"viewer": LOGIN, "serverInfo": SERVER, "model": {"bucket": None}}}


@contextmanager
def serving(fault: str = "", phase: Phase = "never") -> Iterator[Server]:
    """A server in a thread of this process."""
    server = Server(fault, phase)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

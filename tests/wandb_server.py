"""A W&B server on loopback, as far as runs and `wandb sync` need one. It keeps what comes, and fails on command."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Phase = Literal["start", "middle", "end", "never"]
LOGIN = {"id": "VXNlcg==", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}}
SERVER = {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": None, "features": []}
TYPES = ("QueryType", "MutationType", "ServerInfoType", "TypeInfo")


@dataclass
class Kept:
    """What the server has of one run."""

    attributes: dict[str, Any] = field(default_factory=dict)  # as the run gave them: groupName, jobType, sweep, tags, …
    config: dict[str, Any] = field(default_factory=dict)  # without wandb's own
    defined: dict[str, list[int]] = field(default_factory=dict)  # what each metric's summary is, in wandb's numbers
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)  # as they were created, by their names
    preempted: bool = False  # whether it said so before it ended

    def points(self) -> list[tuple[float, str, float]]:
        """Step of training, name and value of each number in the history."""
        unnamed = ("trainer/global_step", "epoch")
        return [
            (row["trainer/global_step"], name, value)
            for row in self.history
            for name, value in row.items()
            if name not in unnamed and not name.startswith("_") and isinstance(value, float | int)
        ]


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
        self.runs: dict[str, Kept] = {}  # by their ids
        self.views: list[dict[str, Any]] = []  # saved workspaces
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
        return [code for run in self.runs.values() for code in run.exit_codes]

    @property
    def history(self) -> set[str]:
        """The names of the metrics that arrived."""
        return {name for run in self.runs.values() for row in run.history for name in row}

    @property
    def ids(self) -> set[str]:
        """Of the runs that began."""
        return set(self.runs)

    def upserted(self, given: dict[str, Any]) -> Kept:
        """A run that begins, goes on, or tells more of itself."""
        run = self.runs.setdefault(given["name"], Kept())
        run.attributes |= {key: value for key, value in given.items() if value is not None}
        if given.get("config"):
            run.config = {key: entry["value"] for key, entry in json.loads(given["config"]).items()}
            metrics = run.config.pop("_wandb", {}).get("m", [])
            run.defined |= {entry["1"]: entry["7"] for entry in metrics if "1" in entry and "7" in entry}
        return run

    def streamed(self, run: Kept, body: dict[str, Any]) -> None:
        """Rows, which replace those from their offset on; a summary; the end."""
        files = body.get("files") or {}
        if rows := files.get("wandb-history.jsonl"):
            run.history[rows["offset"] :] = [json.loads(line) for line in rows["content"]]
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        run.preempted |= bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_codes.append(body["exitcode"])


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

    def uploaded(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Where a file of an artifact goes."""
        named = {"id": "RmlsZQ==", "name": spec["name"], "displayName": spec["name"], "storagePath": spec["name"]}
        url = f"{self.server.url}/up/{spec['name']}"
        artifact = {"artifact": {"id": "QXJ0aWZhY3Q="}}
        return {**named, **artifact, "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}

    @staticmethod
    def listed(name: str, run: Kept) -> dict[str, Any]:
        """A run as a list of runs has it."""
        empty = ("sweepName", "group", "jobType", "commit", "description", "notes", "systemMetrics")
        named = {"id": "UnVuOg==", "name": name, "displayName": name, "projectId": "1", "tags": [], "state": "finished"}
        times = dict.fromkeys(("createdAt", "heartbeatAt"), "2026-01-01T00:00:00Z")
        config = json.dumps({key: {"value": value} for key, value in run.config.items()})
        numbers = {"summaryMetrics": json.dumps(run.summary), "historyLineCount": len(run.history), "readOnly": False}
        return {**dict.fromkeys(empty), **named, **times, **numbers, "config": config, "historyKeys": None, "user": {}}

    def content(self, request: dict[str, Any]) -> dict[str, Any]:
        query, variables = request.get("query", ""), request.get("variables", {})
        if "file_stream" in self.path:
            self.server.streamed(self.server.runs[self.path.split("/")[-2]], request)
            return {"exitcode": None, "limits": {}}
        if "upsertBucket" in query:
            name = variables["name"]
            run = self.server.upserted(variables)
            project = {"id": "UHJvag==", "name": "stu", "entity": {"id": "RW50", "name": "e"}}
            bucket = {"id": "UnVuOg==", "name": name, "displayName": name, "description": None, "config": "{}"}
            bucket |= {"sweepName": variables.get("sweep"), "project": project, "historyLineCount": len(run.history)}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "RunResumeStatus" in query and (known := self.server.runs.get(variables["name"])):
            tail = json.dumps([json.dumps(row) for row in known.history[-1:]])
            config = {key: {"value": value} for key, value in known.config.items()}
            bucket = {"id": "UnVuOg==", "name": variables["name"], "displayName": variables["name"], "tags": []}
            bucket |= {"summaryMetrics": json.dumps(known.summary), "config": json.dumps(config), "notes": None}
            bucket |= {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(known.history)}
            bucket |= {"historyTail": tail, "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
            return {"data": {"model": {"id": "UHJvag==", "name": "stu", "bucket": bucket}}}
        if "createArtifact(" in query:
            given = variables["input"]
            run = self.server.runs[given["runName"]]
            run.artifacts[given["artifactCollectionName"]] = given
            artifact = {"id": "QXJ0aWZhY3Q=", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        if "createArtifactManifest(" in query or "updateArtifactManifest(" in query:
            file = {"id": "RmlsZQ==", "uploadUrl": f"{self.server.url}/up/manifest.json", "uploadHeaders": []}
            payload = {"artifactManifest": {"id": "TWFu", "file": file}}
            return {"data": {"createArtifactManifest": payload, "updateArtifactManifest": payload}}
        if "createArtifactFiles(" in query:
            edges = [{"node": self.uploaded(spec)} for spec in variables["input"]["artifactFiles"]]
            return {"data": {"createArtifactFiles": {"files": {"edges": edges}}}}
        if "commitArtifact(" in query:
            return {"data": {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}}
        if "upsertView" in query:
            self.server.views.append(variables)
            return {
                "data": {"upsertView": {"view": {"id": "VmlldzoxMg==", "name": variables["name"]}, "inserted": True}}
            }
        if "query Runs" in query:
            nodes = [self.listed(name, run) for name, run in self.server.runs.items()]
            edges = [{"node": node, "cursor": node["name"]} for node in nodes]
            runs = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
            return {"data": {"project": {"internalId": "1", "runCount": len(nodes), "readOnly": False, "runs": runs}}}
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

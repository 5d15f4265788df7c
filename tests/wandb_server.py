"""As much of W&B's server as a run talks to: it knows runs and their history, and can fall silent."""

import gzip
import http.server
import json
import re
import threading
from collections import defaultdict
from typing import Any, Self


class WandbServer:
    """W&B's server on this machine, within `with`; `env` leads the real wandb to it."""

    def __init__(self) -> None:
        self.history: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)  # of each run: its rows by line
        self.summaries: dict[str, str] = {}  # of each run, as JSON
        self.exits: list[int] = []  # codes that runs ended with
        self.preempting: list[bool] = []  # whether they were marked so
        self.told: dict[str, dict[str, Any]] = defaultdict(dict)  # of each run: what it said of itself
        self.reports: list[dict[str, Any]] = []  # each that was saved, as often as it was
        self.artifacts: list[tuple[str, str]] = []  # type and name of each; their files are not asked for
        self.asked: list[str] = []  # the path of each request
        self.silent = threading.Event()  # from when on nothing is answered

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"known": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients are killed in these tests
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.env = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": self.url}
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def rows(self, run: str) -> list[dict[str, Any]]:
        """A run's history; no line was left out."""
        lines = self.history[run]
        return [lines[line] for line in range(len(lines))]

    def graphql(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """What a query or mutation is answered."""
        project = {"id": "project", "name": given.get("project"), "entity": {"id": "entity", "name": "me"}}
        bucket = {"id": "run", "name": given.get("name"), "displayName": given.get("displayName")}
        if name == "Viewer":
            return {"viewer": {"id": "user", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "ProjectInternalId":
            return {"project": {"id": "project", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}
        if name == "GetProjects":
            node = {"__typename": "Project", "id": "project", "name": "fashion_ddp", "entityName": "me", "user": None}
            node |= {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False}
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"models": {"pageInfo": page, "edges": [{"node": node}]}}
        if name == "upsertView":
            self.reports.append(given)
            view = {k: given[k] for k in ("type", "name", "displayName", "description", "spec")}
            view |= {"id": "Vmlldzox", "updatedAt": "2026-01-01T00:00:00"}
            view["project"] = {"id": "project", "name": given["projectName"], "entityName": given["entityName"]}
            return {"upsertView": {"view": view, "inserted": True}}
        if name == "ArtifactType":
            return {"project": None}
        if name == "CreateArtifact":
            artifact = given["input"]
            self.artifacts.append((artifact["artifactTypeName"], artifact["artifactCollectionName"]))
            there = {"id": "artifact", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": there}}
        if name == "UpsertBucket":
            self.told[given["name"]].update({k: v for k, v in given.items() if v is not None})
            known = self.history.get(given["name"], {})
            bucket |= {"description": None, "config": "{}", "sweepName": None, "historyLineCount": len(known)}
            return {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": not known}}
        if name == "RunResumeStatus" and (rows := self.history.get(given["name"])):
            lines = {"logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0}
            tails = {"historyTail": json.dumps([json.dumps(rows[max(rows)])]), "eventsTail": "[]"}
            rest = {"config": "{}", "tags": [], "notes": None, "wandbConfig": '{"t": {}}'}
            rest["summaryMetrics"] = self.summaries.get(given["name"], "{}")
            return {"model": project | {"bucket": bucket | lines | tails | rest}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in given["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {"model": None}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """What a run sends as it goes."""
        sent = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for line, row in enumerate(sent["content"], start=sent["offset"]):
            self.history[run][line] = json.loads(row)
        for content in body.get("files", {}).get("wandb-summary.json", {}).get("content", []):
            self.summaries[run] = content
        if body.get("preempting"):
            self.preempting.append(True)
        if body.get("complete"):
            self.exits.append(body["exitcode"])


class _Handler(http.server.BaseHTTPRequestHandler):
    known: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.known.asked.append(self.path)
        if self.known.silent.is_set():
            threading.Event().wait()
        answer: dict[str, Any] = {"exitcode": None, "limits": {}}
        if self.path == "/graphql":
            query = json.loads(body)
            [name] = re.findall(r"(?:query|mutation)\s+(\w+)", query["query"])
            answer = {"data": self.known.graphql(name, query.get("variables") or {})}
        elif found := re.fullmatch(r"/files/.*/(\w+)/file_stream", self.path):
            self.known.stream(found[1], json.loads(body))
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *args: Any) -> None: ...

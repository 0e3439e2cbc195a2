"""As much of W&B's server as online runs, `wandb sync` and workspaces need: it takes everything, and keeps what it was told."""

import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """`runs`: what each run was created or updated with, in order. `history`: rows by run id. `artifacts`: those that
    were uploaded whole, by name. `views`: workspaces. `refuses`: names of runs that are not taken."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs, self.history, self.artifacts, self.views, self.refuses = [], {}, [], [], set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query, variables):
        if "upsertBucket" in query:
            if variables.get("displayName") in self.refuses:
                return {"errors": [{"message": "this run is not wanted"}]}
            self.runs.append(variables)
            project = {"id": "P", "name": variables["project"], "entity": {"id": "E", "name": "me"}}
            bucket = {"id": "R", "name": variables["name"], "displayName": variables.get("displayName"), "project": project}
            count = len(self.history.get(variables["name"], []))
            return {"data": {"upsertBucket": {"bucket": {**bucket, "config": "{}", "historyLineCount": count}, "inserted": not count}}}
        if "RunResumeStatus" in query:
            return {"data": {"model": self.resume_status(variables["name"])}}
        if "createArtifact(" in query:
            artifact = {
                "id": variables["input"]["artifactCollectionName"],
                "state": "PENDING",
                "artifactSequence": {"latestArtifact": None},
            }
            return {"data": {"createArtifact": {"artifact": artifact}}}
        if "createArtifactManifest" in query:
            file = {"id": "F", "directUrl": f"{self.url}/manifest", "uploadUrl": f"{self.url}/manifest", "uploadHeaders": []}
            return {"data": {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}}
        if "createArtifactFiles" in query:
            artifact = {"id": variables["input"]["artifactFiles"][0]["artifactID"]}
            names = [file["name"] for file in variables["input"]["artifactFiles"]]
            nodes = [{"name": name, "displayName": name, "uploadUrl": f"{self.url}/{name}", "uploadHeaders": []} for name in names]
            edges = [{"node": {"id": "F", "storagePath": "", "uploadMultipartUrls": None, "artifact": artifact, **node}} for node in nodes]
            return {"data": {"createArtifactFiles": {"files": {"edges": edges}}}}
        if "commitArtifact" in query:
            self.artifacts.append(variables["artifactID"])
            return {"data": {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}}
        if "viewer" in query:
            return {"data": {"viewer": {"id": "V", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}}}
        if "upsertView" in query:
            self.views.append(variables)
            return {"data": {"upsertView": {"view": {"id": "W", "name": variables["name"]}, "inserted": True}}}
        return {"data": {}}

    def resume_status(self, name):
        """What a run that resumes is told of its earlier part; None where there is none."""
        if not (rows := self.history.get(name)):
            return None
        counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]", "tags": []}
        texts = {"historyTail": json.dumps([json.dumps(rows[-1])]), "summaryMetrics": json.dumps({"_step": rows[-1]["_step"]})}
        bucket = {"id": "R", "name": name, "displayName": name, "config": "{}", "wandbConfig": '{"t": 1}', **counts, **texts}
        return {"id": "P", "name": "P", "entity": {"id": "E", "name": "me"}, "bucket": bucket}


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/graphql":
            asked = json.loads(body)
            return self._send(self.server.answer(asked["query"], asked.get("variables") or {}))
        if self.path.endswith("/file_stream"):
            run = self.path.split("/")[-2]
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.server.history.setdefault(run, []).extend(map(json.loads, lines))
        return self._send({})

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._send({})

    def do_GET(self):
        self._send({})

    def _send(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serving():
    """A running server."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()

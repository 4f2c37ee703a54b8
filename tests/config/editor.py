"""An editor's side of the language server protocol, for the real yaml-language-server (`.ci/run` installs it)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from runs import ROOT

SERVER = ROOT / ".node/node_modules/yaml-language-server/bin/yaml-language-server"
MISSING = "needs node and .node/node_modules/yaml-language-server, which .ci/run installs"


def missing() -> bool:
    return shutil.which("node") is None or not SERVER.exists()


class Editor:
    """Opens texts as if they were files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(["node", str(SERVER), "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.asked = self.opened = 0
        self.found: dict[str, list[dict[str, Any]]] = {}
        folders = [{"uri": folder.as_uri(), "name": "work"}]
        markdown = {"completionItem": {"documentationFormat": ["markdown"], "snippetSupport": True}}
        capabilities = {"workspace": {"configuration": True}, "textDocument": {"completion": markdown}}
        about = {"processId": os.getpid(), "rootUri": folder.as_uri(), "workspaceFolders": folders}
        self.ask("initialize", {**about, "capabilities": capabilities})
        self.tell("initialized", {})

    def tell(self, method: str, params: Any) -> None:
        self._send({"method": method, "params": params})

    def ask(self, method: str, params: Any) -> Any:
        self.asked += 1
        number = self.asked
        self._send({"id": number, "method": method, "params": params})
        while (message := self._receive()).get("id") != number or "method" in message:
            self._take(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, text: str) -> str:
        """The URI of a new file of the folder that holds this text, for the server alone."""
        self.opened += 1
        uri = f"{self.folder.as_uri()}/opened-{self.opened}.yaml"
        self.tell(
            "textDocument/didOpen", {"textDocument": {"uri": uri, "languageId": "yaml", "version": 1, "text": text}}
        )
        return uri

    def diagnostics(self, texts: list[str]) -> list[list[tuple[int, str]]]:
        """What the editor marks in each text: (line from 1, message)."""
        uris = [self.open(text) for text in texts]
        while not self.found.keys() >= set(uris):
            self._take(self._receive())
        return [[(found["range"]["start"]["line"] + 1, found["message"]) for found in self.found[uri]] for uri in uris]

    def complete(self, text: str) -> dict[str, dict[str, Any]]:
        """What is offered where the text has a `|`, by label."""
        before, _, after = text.partition("|")
        uri = self.open(before + after)
        place = {"line": before.count("\n"), "character": len(before.rpartition("\n")[2])}
        offered = self.ask("textDocument/completion", {"textDocument": {"uri": uri}, "position": place})
        return {item["label"]: item for item in offered["items"]}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _take(self, message: dict[str, Any]) -> None:
        """An answer to what the server asks, or its diagnostics."""
        if message.get("method") == "textDocument/publishDiagnostics":
            self.found[message["params"]["uri"]] = message["params"]["diagnostics"]
        elif message.get("method") == "workspace/configuration":
            settings = {"yaml": {"schemaStore": {"enable": False}, "validate": True, "completion": True, "hover": True}}
            self._send(
                {"id": message["id"], "result": [settings.get(i["section"]) for i in message["params"]["items"]]}
            )
        elif "id" in message and "method" in message:
            self._send({"id": message["id"], "result": None})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        self.process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        out = self.process.stdout
        assert out is not None
        size = 0
        while line := out.readline().strip():
            if line.lower().startswith(b"content-length:"):
                size = int(line.partition(b":")[2])
        assert size, f"the server has ended with {self.process.poll()}"
        return dict(json.loads(out.read(size)))

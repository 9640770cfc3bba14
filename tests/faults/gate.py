"""An S3 server that stores, and whose door refuses on command; it also hands out the credentials that it wants to see.

Behind the door is moto. The credentials come as a container's do (`AWS_CONTAINER_CREDENTIALS_FULL_URI`), the one chain
that can change under a process that runs.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

_CREDENTIALS = "/credentials"
_REFUSAL = "<Error><Code>{code}</Code><Message>{code}</Message></Error>"


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        pass


class Gate:
    """Context manager; `endpoint` is the server, `refuse` says which requests (method, path) find the door shut."""

    def __init__(self) -> None:
        self.refuse: Callable[[str, str], bool] = lambda method, path: False
        self.key = "first"
        """The access key that is handed out, and the only one that opens the door."""
        self.signed_by: set[str] = set()
        self.refused = 0
        self._store = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self.endpoint = f"http://127.0.0.1:{self._server.port}"

    def __enter__(self) -> Gate:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.client = boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id=self.key,
            aws_secret_access_key="secret",
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, folder: Path) -> dict[str, str]:
        """The chain of a process that finds its credentials here."""
        token = folder / "container-token"
        token.write_text("any")
        return {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{self.endpoint}{_CREDENTIALS}",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(token), "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == _CREDENTIALS:
            # Good for long, as far as anybody can tell: nobody asks again before a refusal.
            held = {
                "AccessKeyId": self.key,
                "SecretAccessKey": "secret",
                "Token": "t",
                "Expiration": "2100-01-01T00:00:00Z",
            }
            return _answer(start_response, "200 OK", json.dumps(held))
        signer = re.search(r"Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
        key = signer[1] if signer else ""
        code = "ExpiredToken" if key != self.key else "AccessDenied" if self.refuse(method, path) else ""
        if code:
            self.refused += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _answer(start_response, "403 Forbidden", _REFUSAL.format(code=code))
        self.signed_by.add(key)
        return self._store(environ, start_response)


def _answer(start_response: Callable[..., Any], status: str, body: str) -> list[bytes]:
    start_response(status, [("Content-Length", str(len(body)))])
    return [body.encode()]

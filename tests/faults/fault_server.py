"""A small HTTP server that serves one folder and misbehaves on command; speaks enough of S3 for reads.

Faults apply to GET requests for objects: the first `times` of them, then the server behaves. Every request is counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Fault:
    """What goes wrong.

    kind: "cut" (clean end in the middle of the body), "reset" (TCP reset there), "stall" (silence for ever there),
    "503", "zeros" (right length, second half zeros), "short_range" (a shorter 206 that says so), "no_length" (chunked
    or until-close body without a length, cut), "changed" (new bytes and ETag), "ignore_range" (200, whole object),
    "lying_range" (206 of other bytes), "slow_start", "404", "403".
    """

    kind: str
    times: int = 1
    match: str = ".tar"


class FaultServer:
    """Context manager; `uri` is the root, `fault` the misbehaviour, `requests` what was asked, `signed_by` by whom."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.signed_by: set[str] = set()
        self._lock = threading.Lock()
        self._release = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                owner._serve(self, head=True)

            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    owner._serve(self, head=False)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops serving; open connections die with it."""
        self._release.set()
        self._server.shutdown()
        self._server.server_close()

    def _take(self, path: str) -> str:
        with self._lock:
            if self.fault is None or self.fault.times <= 0 or self.fault.match not in path:
                return ""
            self.fault.times -= 1
            return self.fault.kind

    def _serve(self, http: BaseHTTPRequestHandler, *, head: bool) -> None:
        path = http.path.split("?")[0].lstrip("/")
        with self._lock:
            self.requests.append((http.command, path, http.headers.get("Range"), http.headers.get("If-Match")))
            if key := re.search(r"Credential=([^/]+)/", http.headers.get("Authorization") or ""):
                self.signed_by.add(key[1])
        fault = "" if head else self._take(path)
        file = self.root / path
        if fault in ("404", "403", "503") or not file.is_file():
            return self._plain(http, int(fault) if fault else 404)
        data = file.read_bytes()
        if fault == "changed":
            data = bytes(len(data))
        etag = '"' + hashlib.md5(data).hexdigest() + '"'
        if http.headers.get("If-Match") not in (None, etag):
            return self._plain(http, 412)
        return self._body(http, data, etag, fault, head)

    def _plain(self, http: BaseHTTPRequestHandler, status: int) -> None:
        http.send_response(status)
        http.send_header("Content-Length", "0")
        http.end_headers()

    def _body(self, http: BaseHTTPRequestHandler, data: bytes, etag: str, fault: str, head: bool) -> None:
        start, end, status = 0, len(data), 200
        wanted = re.match(r"bytes=(\d+)-(\d*)", http.headers.get("Range") or "")
        if wanted and fault != "ignore_range":
            start, status = int(wanted[1]), 206
            end = min(len(data), int(wanted[2]) + 1) if wanted[2] else len(data)
            if fault == "short_range":
                end = start + max(1, (end - start) // 2)
            if fault == "lying_range":
                shift = 7 if start >= 7 else 0
                start, end = start - shift, end - shift
        piece = data[start:end]
        if fault == "zeros":
            piece = piece[: len(piece) // 2] + bytes(len(piece) - len(piece) // 2)
        http.send_response(status)
        http.send_header("ETag", etag)
        http.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        http.send_header("Accept-Ranges", "bytes")
        if status == 206:
            shift = 7 if fault == "lying_range" and int(wanted[1]) >= 7 else 0
            http.send_header("Content-Range", f"bytes {start + shift}-{end + shift - 1}/{len(data)}")
        if fault == "no_length":
            http.send_header("Connection", "close")
            http.close_connection = True
        else:
            http.send_header("Content-Length", str(len(piece)))
        http.end_headers()
        if head:
            return
        if fault in ("cut", "reset", "stall", "no_length"):
            http.wfile.write(piece[: len(piece) // 2])
            http.wfile.flush()
            self._break(http, fault)
            return
        if fault == "slow_start":
            time.sleep(0.3)
        http.wfile.write(piece)

    def _break(self, http: BaseHTTPRequestHandler, fault: str) -> None:
        http.close_connection = True
        if fault == "stall":
            self._release.wait(60)
        if fault == "reset":
            http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            if fault != "reset":
                http.connection.shutdown(socket.SHUT_RDWR)
            http.connection.close()

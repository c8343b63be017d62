"""A small S3 server for the tests: as much of S3 as the store asks for, wrong where it is told to be.

It keeps objects in memory and believes every signature. What it can get wrong has been seen on real servers,
or is allowed by HTTP, or made by proxies::

    window       looks whether the object is there before the body comes, and writes it after
    bare_etags   knows an If-Match without quotes only; to the others it answers 412
    unchecked    does not compare a body with the SHA-256 that its put is signed with
    opaque       ETags that are not the MD5 of the body
    no_urls      answers 403 to signed URLs
    no_digests   answers 400 to puts that are signed with a digest by hand (`winnow.store.objects.signing`)
    no_deletes   answers 403 to deletes
    no_if_match  answers 501 to If-Match
    weak_etags   ETags marked as weak in its replies; an If-Match is compared with the strong one
    part_etags   ETags of bodies beyond 200 bytes as of an upload in parts
    old_pages    lists 1,000 keys at most, in the pages of the older ListObjects
    encoded_keys lists keys as they are in URLs
    compressed   compresses whole objects on their way
    early        answers 412 before the body is read, and hangs up
    interim      says 103 before it answers a put
"""

from __future__ import annotations

import gzip
import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

MEETING_SECONDS, MEETING_BYTES = 5.0, 1 << 20
"""Where there is a window, a put of so many bytes waits so long for another one to look as well."""
OLD_PAGE = 1000
"""Keys of one page of the older listing."""


class SmallS3:
    """Listens on loopback while its `with` block lasts.

    Args:
        wrong: What it gets wrong, see above.
    """

    def __init__(self, *wrong: str) -> None:
        self.wrong = set(wrong)
        self.objects: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        """Method (and `url` where it is a signed URL) -> requests."""
        self.spoil: Callable[[str, bytes], bytes] = lambda _, body: body
        """(key, body sent) -> the body that arrives."""
        self.answer: Callable[[str, str], tuple[int, str] | None] = lambda _, __: None
        """(method, key) -> status and S3 code to answer instead."""
        self.tokens: Callable[[str], bool] = lambda _: True
        """Whether a session's token is valid; to others it answers that they are expired."""
        self.silent_page: int | None = None
        """Objects after which a listing ends and says that it is whole."""
        self.lock, self.met = threading.Lock(), dict[str, threading.Event]()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.s3 = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "small",
            "AWS_SECRET_ACCESS_KEY": "small-secret",
        }

    def etag(self, body: bytes) -> str:
        """An object's ETag, with its quotes."""
        digest = hashlib.md5(body).hexdigest()
        if "part_etags" in self.wrong and len(body) > 200:
            return f'"{digest[::-1]}-2"'
        return f'"{digest[::-1]}-x"' if "opaque" in self.wrong else f'"{digest}"'

    def meet(self, key: str) -> None:
        """The first to put an object waits for a second who looked too: what a slow disk makes likely."""
        with self.lock:
            first, met = key not in self.met, self.met.setdefault(key, threading.Event())
        if first:
            met.wait(MEETING_SECONDS)
        else:
            met.set()

    def __enter__(self) -> SmallS3:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    s3: SmallS3


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def setup(self) -> None:
        super().setup()
        self.s3 = self.server.s3

    def begin(self) -> bool:
        """Take the request apart; False where it is answered already."""
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query, keep_blank_values=True)
        self.key = unquote(parts.path).partition("/")[2].partition("/")[2]
        by_url = "X-Amz-Signature" in self.query
        self.s3.asked[f"{self.command} url" if by_url else self.command] += 1
        self.there = self.key in self.s3.objects  # before the body comes
        if self.there and "early" in self.s3.wrong and self.headers.get("If-None-Match") == "*":
            self.close_connection = True
            self.fail(412, "PreconditionFailed")
            return False
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = self.s3.answer(self.command, self.key)
        token = self.query.get("X-Amz-Security-Token", [self.headers.get("x-amz-security-token", "")])[0]
        if said is None and not self.s3.tokens(token):
            said = 400, "ExpiredToken"
        if said is None and by_url and "no_urls" in self.s3.wrong:
            said = 403, "AccessDenied"
        by_hand = not self.headers.get("User-Agent")  # obstore names itself
        if said is None and self.command == "PUT" and by_hand and "no_digests" in self.s3.wrong:
            said = 400, "InvalidRequest"
        if said is not None:
            self.fail(*said)
        return said is None

    def do_PUT(self) -> None:
        if not self.begin():
            return None
        s3 = self.s3
        if "interim" in s3.wrong:
            self.send_response_only(103)
            self.end_headers()
        if "no_if_match" in s3.wrong and "If-Match" in self.headers:
            return self.fail(501, "NotImplemented")
        slow = "window" in s3.wrong and not self.there and len(self.body) >= MEETING_BYTES
        if slow and self.headers.get("If-None-Match") == "*":
            s3.meet(self.key)
        signed, arrived = self.headers["x-amz-content-sha256"], s3.spoil(self.key, self.body)
        if "unchecked" not in s3.wrong and signed != hashlib.sha256(arrived).hexdigest():
            return self.fail(400, "XAmzContentSHA256Mismatch")
        with s3.lock:
            there = self.there if "window" in s3.wrong else self.key in s3.objects
            if self.headers.get("If-None-Match") == "*" and there:
                return self.fail(412, "PreconditionFailed")
            wanted = self.headers.get("If-Match")
            if wanted is not None and wanted != self.known(s3.objects.get(self.key)):
                return self.fail(412, "PreconditionFailed")
            s3.objects[self.key] = arrived
        return self.reply(200, etag=s3.etag(arrived))

    def known(self, body: bytes | None) -> str | None:
        """The If-Match that this server takes for an object."""
        etag = None if body is None else self.s3.etag(body)
        return etag.strip('"') if etag and "bare_etags" in self.s3.wrong else etag

    def do_GET(self) -> None:
        if not self.begin():
            return None
        if not self.key:
            return self.listing()
        body = self.s3.objects.get(self.key)
        if body is None:
            return self.fail(404, "NoSuchKey")
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return self.reply(200, body, self.s3.etag(body))
        first = int(match[1]) if match[1] else max(0, len(body) - int(match[2]))
        last = min(int(match[2] or len(body)) if match[1] else len(body), len(body) - 1)
        if first >= len(body):
            return self.fail(416, "InvalidRange")
        where = f"bytes {first}-{last}/{len(body)}"
        return self.reply(206, body[first : last + 1], self.s3.etag(body), where)

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        if self.begin():
            self.delete([self.key])

    def do_POST(self) -> None:
        if self.begin():  # several deletes
            self.delete([unquote(key) for key in re.findall(r"<Key>(.*?)</Key>", self.body.decode())])

    def delete(self, keys: list[str]) -> None:
        if "no_deletes" in self.s3.wrong:
            if self.command == "DELETE":
                return self.fail(403, "AccessDenied")
            told = "".join(
                f"<Error><Key>{escape(key)}</Key><Code>AccessDenied</Code><Message>No.</Message></Error>"
                for key in keys
            )
        else:
            told = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            for key in keys:
                self.s3.objects.pop(key, None)
        if self.command == "DELETE":
            return self.reply(204)
        return self.reply(200, f"<DeleteResult>{told}</DeleteResult>".encode())

    def listing(self) -> None:
        wrong, prefix = self.s3.wrong, self.query.get("prefix", [""])[0]
        after = "" if "old_pages" in wrong else self.query.get("start-after", [""])[0]
        everything = sorted(self.s3.objects.items())
        found = [(key, body) for key, body in everything if key.startswith(prefix) and key > after]
        more, cut = "false", ""
        if "old_pages" in wrong and len(found) > OLD_PAGE:
            found, more = found[:OLD_PAGE], "true"
            cut = f"<NextMarker>{escape(found[-1][0])}</NextMarker>"
        found = found[: self.s3.silent_page]
        spelt = quote if "encoded_keys" in wrong else str
        told = "".join(
            f"<Contents><Key>{escape(spelt(key))}</Key><Size>{len(body)}</Size>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, body in found
        )
        told = f"<IsTruncated>{more}</IsTruncated>{cut}{told}"
        self.reply(200, f"<ListBucketResult>{told}</ListBucketResult>".encode())

    def fail(self, status: int, code: str) -> None:
        self.reply(status, f"<Error><Code>{code}</Code><Message>said the server</Message></Error>".encode())

    def reply(self, status: int, body: bytes = b"", etag: str = "", where: str = "") -> None:
        wrong, encoding = self.s3.wrong, ""
        if "weak_etags" in wrong and etag:
            etag = f"W/{etag}"
        if "compressed" in wrong and self.command == "GET" and etag and not where:
            body, encoding = gzip.compress(body), "gzip"
        self.send_response_only(status)
        for name, value in (("ETag", etag), ("Content-Range", where), ("Content-Encoding", encoding)):
            if value:
                self.send_header(name, value)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

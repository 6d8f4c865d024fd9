"""A report that redraws itself while runs go on: a page on this machine alone, which reads run folders and writes nothing there.

The server is bound to the loopback address, answers GET and HEAD of two paths (`/` the page, `/stamp` what it was drawn
from), and refuses a request that names another host, as a page of another site would through a name that it controls.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from altgrad.analysis.comparison_report import write_report
from altgrad.analysis.study import is_study
from altgrad.analysis.study_report import write_study
from altgrad.errors import OptionError, ReportError
from altgrad.records.documents import RESULT
from altgrad.records.metrics_log import METRICS
from altgrad.records.run import find_runs
from altgrad.report.pages.page import render_page

LOOPBACK = "127.0.0.1"
POLL_MS = 2000
_POLICY = "default-src 'none';"
_STRIP = '<div class="strip">'
_SCRIPT = """
<script>
(() => {
  const drawn = %s;
  let waiting = false;
  setInterval(async () => {
    if (waiting || document.hidden) return;
    waiting = true;
    try {
      const now = await (await fetch("/stamp", {cache: "no-store"})).text();
      if (now !== drawn || document.title.startsWith("(stopped)")) location.reload();
    } catch {
      document.title = "(stopped) " + document.title.replace(/^\\(stopped\\) /, "");
      document.querySelector(".strip .live").textContent = "no longer live: altgrad watch has ended";
    }
    waiting = false;
  }, %d);
})();
</script>
</body>"""


class LivePage:
    """The report of all runs at or below some folders, drawn again when one of them has grown."""

    def __init__(self, roots: Sequence[str | Path]) -> None:
        self.roots = [Path(root) for root in roots]
        for root in self.roots:
            find_runs(root)  # refuses what is no folder
        self._lock, self._drawn = Lock(), ("", "")

    def stamp(self) -> str:
        """A word that changes when a run has new records or a result, or when a run is added."""
        seen = sha256()
        for folder in self._runs():
            for name in (METRICS, RESULT):
                try:
                    found = (folder / name).stat()
                except OSError:
                    continue
                seen.update(f"{folder}/{name} {found.st_size} {found.st_mtime_ns}\n".encode())
        return seen.hexdigest()[:16]

    def html(self) -> str:
        """The page as it stands."""
        with self._lock:
            stamp = self.stamp()
            if stamp != self._drawn[0]:
                self._drawn = stamp, self._draw(stamp)
            return self._drawn[1]

    def _runs(self) -> list[Path]:
        return [folder for root in self.roots for folder in find_runs(root)]

    def _draw(self, stamp: str) -> str:
        folders = self._runs()
        try:
            with tempfile.TemporaryDirectory() as scratch:
                write = write_study if is_study(folders) else write_report
                page = write(folders, Path(scratch) / "live.html", force=True).read_text("utf-8")
        except ReportError as error:
            said = str(error) if folders else f"No run in {', '.join(map(str, self.roots))} yet."
            page = render_page(
                "base.html.j2",
                title="AltGrad: waiting",
                kind="watch",
                headline="Waiting for the first steps",
                lede=[f"{said} This page draws itself again when a run has begun."],
            )
        page = page.replace(_POLICY, f"{_POLICY} connect-src 'self';", 1)
        page = page.replace(_STRIP, f'{_STRIP}<span class="live">live</span>', 1)
        before, _, after = page.rpartition("</body>")
        return before + _SCRIPT % (json.dumps(stamp), POLL_MS) + after


def live_server(page: LivePage, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page on the loopback address; `serve_forever` runs it, `server_port` is its port.

    Args:
        port: 0 takes a free one.

    Raises:
        OptionError: the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "altgrad", ""

        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (LOOPBACK, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN, "this page is for this machine")
            elif self.path == "/":
                self._answer(page.html().encode(), "text/html; charset=utf-8")
            elif self.path == "/stamp":
                self._answer(page.stamp().encode(), "text/plain; charset=utf-8")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        do_HEAD = do_GET

        def _answer(self, content: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(content))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("Referrer-Policy", "no-referrer"),
            ):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise OptionError(
            f"port {port} cannot be had ({error}); choose another with --port, or 0 for a free one"
        ) from None

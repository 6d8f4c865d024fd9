"""The live page: redrawn when runs grow, on this machine alone, reading only."""

import http.client
import threading

import pytest

from altgrad.analysis.live import LivePage, live_server
from altgrad.errors import OptionError, ReportError
from tests.run_folders import make_run


@pytest.fixture
def served(tmp_path):
    server = live_server(LivePage([tmp_path]))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def ask(path="/", method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    yield ask
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_waits_for_runs_and_is_drawn_again_when_they_grow(served, tmp_path):
    status, page = served()
    assert status == 200
    assert "yet" in page
    before = served("/stamp")[1]
    folder = make_run(tmp_path / "first")
    left = sorted(path.name for path in folder.iterdir())
    after = served("/stamp")[1]
    assert after != before
    page = served()[1]
    assert f'const drawn = "{after}"' in page
    assert "connect-src 'self'" in page
    assert "<svg" in page
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    assert served("/stamp")[1] != after
    assert sorted(path.name for path in folder.iterdir()) == left


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"path": "/first/config.yaml"}, 404),
        ({"path": "/../etc/passwd"}, 404),
        ({"Host": "evil.example:80"}, 403),
        ({"method": "POST"}, 501),
        ({"method": "HEAD", "path": "/stamp"}, 200),
    ],
    ids=str,
)
def test_nothing_else_is_answered(served, request_, status):
    assert served(**request_)[0] == status


def test_what_cannot_be_watched_is_said(tmp_path):
    with pytest.raises(ReportError, match="is not a folder"):
        LivePage([tmp_path / "nowhere"])
    with live_server(LivePage([tmp_path])) as taken, pytest.raises(OptionError, match="choose another with --port"):
        live_server(LivePage([tmp_path]), taken.server_port)
    with pytest.raises(OptionError, match="port 70000 cannot be had"):
        live_server(LivePage([tmp_path]), 70000)

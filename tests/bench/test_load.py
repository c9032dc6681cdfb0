"""The load's figures, against a server whose times are known: both run in a loop whose clock only
moves when all wait, so that the figures are exact on any machine."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import selectors
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitpoint.bench.load import Load, Served, complete, drive
from splitpoint.errors import ServerFailed

HOST = "127.0.0.1"


class Patient(selectors.DefaultSelector):
    """Takes no time to wait for a timer: the clock moves on."""

    now = 0.0

    def select(self, timeout=None):
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        if events := super().select(0.005):  # what was sent a moment ago
            return events
        self.now += timeout
        return []


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = Patient()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


class Mock:
    """Answers with tokens at known times, one request at a time if `serial`."""

    def __init__(self, first=0.2, each=0.05, *, serial=False, cut=None, counted=None, texts=None):
        self.first, self.each = first, each
        self.turn = asyncio.Semaphore(1 if serial else 1000)
        self.cut = cut or (lambda text: [text])
        self.counted, self.texts = counted, texts
        self.arrived: list[float] = []
        self.asked: list[dict] = []

    async def __call__(self, reader, writer):
        clock = asyncio.get_running_loop().time
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        asked = json.loads(await reader.readexactly(length))
        self.arrived.append(clock())
        self.asked.append(asked)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        # As a chat server does: an event without a token comes at once.
        self.send(writer, {"choices": [{"text": ""}]})
        async with self.turn:
            for number in range(asked["max_tokens"]):
                await asyncio.sleep(self.each if number else self.first)
                text = self.texts[number] if self.texts else f"t{number} "
                self.send(writer, {"choices": [{"text": text, "token_ids": [number]}]})
        counted = asked["max_tokens"] if self.counted is None else self.counted
        self.send(writer, {"choices": [], "usage": {"completion_tokens": counted}})
        self.chunks(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        writer.close()

    def send(self, writer, event):
        self.chunks(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    def chunks(self, writer, text):
        for part in self.cut(text):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")


def against(make, ask):
    """What `ask(port)` gives while a server runs; and the server."""

    async def both():
        mock = make()
        server = await asyncio.start_server(mock, HOST, 0)
        async with server:
            return await ask(server.sockets[0].getsockname()[1]), mock

    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(both())


def run(make, load: Load, seed=0) -> tuple[Served, Mock]:
    prompts = load.prompts(500, seed)
    return against(make, lambda port: drive(HOST, port, "m", load, prompts, seed))


def test_times_are_those_of_the_server():
    served, mock = run(Mock, Load(math.inf, 4, 5, 3))
    assert served.mean_ttft == pytest.approx(200)
    assert served.median_ttft == pytest.approx(200)
    assert served.mean_tpot == pytest.approx(50)
    assert served.median_tpot == pytest.approx(50)
    assert served.throughput == pytest.approx(3 / 0.4)
    assert {len(asked["prompt"]) for asked in mock.asked} == {4}
    assert all(asked["ignore_eos"] and asked["temperature"] == 0 for asked in mock.asked)


def test_waiting_for_others_is_part_of_the_first_token():
    served, _ = run(lambda: Mock(serial=True), Load(math.inf, 4, 5, 3))
    assert served.median_ttft == pytest.approx(600)  # 200, 600 and 1000
    assert served.mean_ttft == pytest.approx(600)
    assert served.mean_tpot == pytest.approx(50)
    assert served.throughput == pytest.approx(3 / 1.2)


def test_mean_and_median_are_told_apart():
    served, _ = run(lambda: Mock(serial=True), Load(math.inf, 4, 1, 4))
    assert served.mean_ttft == pytest.approx(500)
    assert math.isnan(served.mean_tpot)  # one token each: there is none after the first


def test_requests_are_sent_at_the_times_of_the_load():
    load = Load(4.0, 2, 2, 12)
    served, mock = run(Mock, load, seed=3)
    assert mock.arrived == pytest.approx(load.arrivals(3))
    assert served.throughput == pytest.approx(12 / (load.arrivals(3)[-1] + 0.25))


def test_a_rate_is_kept_on_average_and_its_times_are_random():
    arrivals = Load(4.0, 1, 1, 4000).arrivals(0)
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)  # as an exponential has it
    assert Load(4.0, 1, 1, 4000).arrivals(1) != arrivals
    assert Load(math.inf, 1, 1, 3).arrivals(0) == [0, 0, 0]


def test_prompts_are_the_same_for_a_seed_and_within_the_vocabulary():
    load = Load(1.0, 50, 1, 4)
    assert load.prompts(300, 7) == load.prompts(300, 7) != load.prompts(300, 8)
    assert all(0 < token < 300 for prompt in load.prompts(300, 7) for token in prompt)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.text(min_size=3, max_size=3))
def test_an_answer_may_come_in_any_pieces(sizes, texts):
    def cut(text):
        parts = []
        while text:
            size = sizes[len(parts) % len(sizes)]
            parts, text = [*parts, text[:size]], text[size:]
        return parts

    answer, _ = against(
        lambda: Mock(cut=cut, texts=list(texts)), lambda port: complete(HOST, port, "m", [1], 3)
    )
    assert answer.text == texts
    assert answer.token_ids == (0, 1, 2)
    assert answer.first - answer.sent == pytest.approx(0.2)


def test_tokens_without_text_count():
    answer, _ = against(
        lambda: Mock(texts=["", "", "é"]), lambda port: complete(HOST, port, "m", [1], 3)
    )
    assert answer.first - answer.sent == pytest.approx(0.2)
    assert answer.last - answer.first == pytest.approx(0.1)


def test_another_number_of_tokens_is_refused():
    with pytest.raises(ServerFailed, match="answered 2 tokens; 3 were asked for"):
        run(lambda: Mock(counted=2), Load(math.inf, 4, 3, 2))


EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'HTTP/1.1 422 No\r\nContent-Length: 15\r\n\r\n{"detail": "x"}', 'refused.*"detail"'),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "broke off.*404 Not Found"),
        (CHUNKED + b"%x\r\n%b\r\n" % (len(EVENT), EVENT), "broke off"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + EVENT, "answered None tokens"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": "out of memory"}\n\n', "out of memory"),
        (b"", "broke off"),
    ],
    ids=["refused", "unknown", "half", "uncounted", "error", "nothing"],
)
def test_what_is_not_a_whole_answer_is_refused(answer, message):
    async def mock(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.write_eof()

    with pytest.raises(ServerFailed, match=message):
        against(lambda: mock, lambda port: complete(HOST, port, "m", [1], 3))


def test_no_server_is_said():
    async def ask():
        return await complete(HOST, 1, "m", [1], 3)

    with pytest.raises(ServerFailed, match="broke off"):
        asyncio.run(ask())

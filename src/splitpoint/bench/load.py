"""A load for a server with OpenAI's completions: requests at random times, and when tokens came.

As `vllm bench serve` has it: times between requests are exponential, TTFT is from sending a request
to its first token, TPOT the time between the first and the last token over the tokens after the
first, the throughput is of all requests from the first one's sending to the last one's end.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ServerFailed

Clock = Callable[[], float]

Ask = Callable[[str, Sequence[int], int], dict[str, Any]]
"""The body of a request for a greedy answer: of a model, for a prompt, of so many tokens."""


def ask_vllm(model: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """The request as vLLM takes it, with the prompt as tokens."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


@dataclass(frozen=True)
class Load:
    """What is asked of a server."""

    qps: float
    """Requests a second, on average; `math.inf` for all at once."""
    input: int
    """Tokens of each prompt."""
    output: int
    """Tokens of each answer."""
    requests: int
    """How many there are."""

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        """Random prompts, as tokens; the same for the same seed. They share no beginning."""
        numbers = random.Random(seed)
        few = min(1000, vocabulary // 2)  # the first tokens are special in many vocabularies
        return [
            [numbers.randrange(few, vocabulary) for _ in range(self.input)]
            for _ in range(self.requests)
        ]

    def arrivals(self, seed: int) -> list[float]:
        """When each request is sent, in seconds from the first one's."""
        if math.isinf(self.qps):
            return [0.0] * self.requests
        numbers = random.Random(seed + 1)
        gaps = [numbers.expovariate(self.qps) for _ in range(self.requests - 1)]
        return [sum(gaps[:count]) for count in range(self.requests)]


@dataclass(frozen=True)
class Served:
    """How a load was served; times in milliseconds."""

    mean_ttft: float
    median_ttft: float
    mean_tpot: float
    median_tpot: float
    throughput: float
    """Requests a second."""


@dataclass(frozen=True)
class Answer:
    """One request's outcome."""

    tokens: int
    sent: float
    first: float
    last: float
    """Seconds of the clock: when it was sent, and when its first and last tokens came."""
    text: str
    token_ids: tuple[int, ...]
    """Empty where the server does not tell them."""


def serve(
    host: str,
    port: int,
    model: str,
    load: Load,
    *,
    vocabulary: int,
    seed: int = 0,
    ask: Ask = ask_vllm,
) -> Served:
    """Send a load, as `ask` has it, and wait for all answers.

    Raises:
        ServerFailed: when a request is refused, breaks off, or has another number of tokens.
    """
    return asyncio.run(drive(host, port, model, load, load.prompts(vocabulary, seed), seed, ask))


async def drive(
    host: str,
    port: int,
    model: str,
    load: Load,
    prompts: Sequence[Sequence[int]],
    seed: int,
    ask: Ask = ask_vllm,
) -> Served:
    """As `serve`, in the running event loop, whose clock it reads."""
    clock = asyncio.get_running_loop().time
    start = clock()

    async def one(prompt: Sequence[int], arrival: float) -> Answer:
        await asyncio.sleep(start + arrival - clock())
        return await complete(host, port, model, prompt, load.output, ask)

    arrivals = zip(prompts, load.arrivals(seed), strict=True)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(prompt, arrival)) for prompt, arrival in arrivals]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return summary([task.result() for task in tasks], clock() - start)


def summary(answers: Sequence[Answer], seconds: float) -> Served:
    """The figures of all requests, which took so long together."""
    ttft = [1e3 * (each.first - each.sent) for each in answers]
    tpot = [
        1e3 * (each.last - each.first) / (each.tokens - 1) for each in answers if each.tokens > 1
    ] or [math.nan]
    return Served(
        statistics.mean(ttft),
        statistics.median(ttft),
        statistics.mean(tpot),
        statistics.median(tpot),
        len(answers) / seconds,
    )


async def complete(
    host: str, port: int, model: str, prompt: Sequence[int], tokens: int, ask: Ask = ask_vllm
) -> Answer:
    """One greedy answer of exactly so many tokens.

    Raises:
        ServerFailed: as `serve`.
    """
    body = ask(model, prompt, tokens)
    clock = asyncio.get_running_loop().time
    sent = clock()
    first = last = math.nan
    text, counted = "", None
    ids: list[int] = []
    async for event in _post(host, port, "/v1/completions", body):
        if "error" in event:
            raise ServerFailed(f"the server refused a request: {json.dumps(event)[:300]}")
        usage = event.get("usage")
        counted = usage["completion_tokens"] if usage else counted
        for choice in event.get("choices", ()):
            # A character may need several tokens: the text of the first ones is empty then.
            if choice.get("text") or choice.get("token_ids"):
                last = clock()
                first = last if math.isnan(first) else first
                text += choice.get("text") or ""
                ids += choice.get("token_ids") or []
    if counted != tokens or math.isnan(first):
        raise ServerFailed(f"the server answered {counted} tokens; {tokens} were asked for")
    return Answer(tokens, sent, first, last, text, tuple(ids))


async def _post(host: str, port: int, path: str, body: object) -> AsyncIterator[dict[str, Any]]:
    """The events of an answer, as they come: of a stream, or the one JSON of a refusal."""
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
        try:
            text = json.dumps(body).encode()
            head = (
                f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            )
            writer.write(head.encode() + text)
            async for line in _lines(reader):
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield json.loads(line[6:])
                elif line.startswith(b"{"):
                    yield {"error": json.loads(line)}
        finally:
            writer.close()
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise ServerFailed(f"an answer of the server broke off: {error!r}") from error


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of an answer's body."""
    status = await reader.readline()
    head = [status, *[line async for line in _until_empty(reader)]]
    chunked = any(line.lower().startswith(b"transfer-encoding: chunked") for line in head)
    rest = b""
    while True:
        if chunked:
            size = int((await reader.readline()).partition(b";")[0], 16)
            part = (await reader.readexactly(size + 2))[:-2]
        else:
            part = await reader.read(1 << 16)
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
        if not part:
            break
    if rest:
        yield rest
    if not status.split()[1:2] == [b"200"]:
        raise ValueError(status.decode(errors="replace").strip())


async def _until_empty(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while (line := await reader.readline()).strip():
        yield line

"""The server under 32 clients with the guard on: every way that an answer can end, at once.

    python bench/guard/clients.py [smollm2|qwen] [--seconds 120]

The clients are OpenAI's, in a process of their own. Each request is first asked alone. Then all
clients ask at once: streams and whole answers, behind a history or not, harmful and harmless, with
stop strings, and some that are left in the midst. An answer that opens like the one to another
prompt, and to no third one, and longer than like its own, has crossed over. Batches round
otherwise, so that answers may part from those that were given alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import table, write
from run import CASES, HERE

from safegene_edge.evals.asking.suites import load_suite

CLIENTS, TOKENS, CONTEXT = 32, 100, 32 * 512
EACH = 16  # prompts a kind
STOP = "."
BEFORE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, friend!"}]
KINDS = ("harmless", "harmless, streamed", "harmless, behind a history",
         "harmful, behind a history", "harmful, behind a history, streamed",
         "harmless, stopped by a string", "left in the midst")  # fmt: skip


def requests() -> list[dict[str, Any]]:
    """Every request: its kind, messages and options."""
    texts = {
        kind: [p.text for suite in load_suite(kind) for p in suite.sample(EACH).prompts]
        for kind in ("harmful", "harmless")
    }
    return [
        {
            "kind": kind,
            "messages": [*BEFORE * ("history" in kind), {"role": "user", "content": text}],
            "stream": "streamed" in kind or "left" in kind,
            "stop": [STOP] if "string" in kind else None,
        }
        for kind in KINDS
        for text in texts["harmful" if "harmful" in kind else "harmless"]
    ]


# -- the clients' process -----------------------------------------------------


async def asked(client: Any, model: str, request: dict[str, Any]) -> dict[str, Any]:
    """One answer: its text and how it ended."""
    answer = await client.chat.completions.create(
        model=model, messages=request["messages"], max_tokens=TOKENS, temperature=0,
        stream=request["stream"], stop=request["stop"],
    )  # fmt: skip
    if not request["stream"]:
        (choice,) = answer.choices
        return {"text": choice.message.content, "finish": choice.finish_reason}
    text, finish, pieces = "", None, 0
    async for chunk in answer:
        for choice in chunk.choices:
            text, finish = text + (choice.delta.content or ""), choice.finish_reason or finish
        pieces += 1
        if request["kind"] == "left in the midst" and pieces == 4:
            await answer.close()
            return {"text": text, "finish": "left"}
    return {"text": text, "finish": finish}


async def load(url: str, seconds: float) -> list[dict[str, Any]]:
    """What each request came to: alone, and then of 32 clients at once."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    model, every = (await client.models.list()).data[0].id, requests()
    found = []

    async def ask(number: int, alone: bool) -> None:
        entry: dict[str, Any] = {"number": number, "alone": alone}
        try:
            entry |= await asked(client, model, every[number])
        except Exception as error:
            entry["error"] = repr(error)
        found.append(entry)

    for number in range(len(every)):
        await ask(number, alone=True)
    end = time.monotonic() + seconds

    async def one(place: int) -> None:
        number = place * 7
        while time.monotonic() < end:
            await ask(number % len(every), alone=False)
            number += CLIENTS + 1

    await asyncio.gather(*map(one, range(CLIENTS)))
    return found


# -- what came of it ----------------------------------------------------------


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    every = requests()
    alone = {e["number"]: e.get("text", "") for e in found if e["alone"]}
    rows: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for entry in found:
        kind = every[entry["number"]]["kind"]
        if entry["alone"] or "error" in entry:
            rows[kind]["errors"] += "error" in entry
            continue
        own, text = alone[entry["number"]], entry["text"]
        rows[kind] += Counter(requests=1, equal=text == own)
        rows[kind]["crossed"] += entry["finish"] != "left" and _crossed(entry, alone, every)
        rows[kind][entry["finish"]] += 1
        rows[kind]["stop string said"] += bool(every[entry["number"]]["stop"]) and STOP in text
    return {kind: dict(counts) for kind, counts in rows.items()}


def _crossed(entry: dict[str, Any], alone: dict[int, str], every: list[dict[str, Any]]) -> bool:
    """Whether an answer opens like that to one other prompt, and longer than like its own.

    An opening that several prompts' answers have, such as a refusal's, tells nothing.
    """
    text, asked = entry["text"], every[entry["number"]]["messages"][-1]

    def alike(other: str) -> int:
        pairs = enumerate(zip(text, other, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))

    prompts = [(request["messages"][-1], alone[n]) for n, request in enumerate(every)]
    own = max(alike(said) for prompt, said in prompts if prompt == asked)
    others = {
        prompt["content"] for prompt, said in prompts
        if prompt != asked and alike(said) > max(own, 40)
    }  # fmt: skip
    return own < len(text) and len(others) == 1


def text_of(results: dict[str, Any]) -> str:
    ends = ("stop", "length", "content_filter", "left")
    head = ["request", "answers", "as alone", *ends, "errors", "crossed over", "stop string said"]
    keys = ("requests", "equal", *ends, "errors", "crossed", "stop string said")
    rows = [[kind, *(counts.get(key, 0) for key in keys)]
            for kind, counts in results["kinds"].items()]  # fmt: skip
    return (
        "# The server under 32 clients, with the guard\n\n"
        f"{results['of']}. Each of {EACH * len(KINDS)} requests was asked alone, then {CLIENTS} "
        f"clients asked for {results['seconds']:.0f} seconds, answers of at most {TOKENS} tokens; "
        f"how they ended is of the latter.\n\n{table(head, rows)}\n"
        f"Resident memory was {results['rss_mib'][0]} MiB before and {results['rss_mib'][1]} "
        "behind it.\n"
    )


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        json.dump(asyncio.run(load(sys.argv[2], float(sys.argv[3]))), sys.stdout)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", choices=CASES, default="smollm2")
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    case = CASES[options.case]
    with ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "safegene_edge", "serve", str(case.target),
                   "--gene", str(case.cached(".gguf")), "--port", str(port),
                   "--slots", str(CLIENTS), "--ctx", str(CONTEXT)]  # fmt: skip
        server = subprocess.Popen(command)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        url = f"http://127.0.0.1:{port}"
        _wait_for(url)
        before = _rss(server.pid)
        clients = [sys.executable, __file__, "--load", url, str(options.seconds)]
        found = json.loads(subprocess.run(clients, stdout=subprocess.PIPE, check=True).stdout)
        if keep := os.environ.get("CLIENTS_KEEP"):  # to look at what has crossed over
            Path(keep).write_text(json.dumps(found))
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            assert answer.status == 200
        memory = [before, _rss(server.pid)]
    results = {"of": case.words, "seconds": options.seconds, "rss_mib": memory,
               "kinds": summary(found)}  # fmt: skip
    write(HERE, results, text_of(results), f"{case.results}-clients")


def _wait_for(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


def _rss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024


if __name__ == "__main__":
    main()

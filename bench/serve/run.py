"""The server under 32 clients, beside llama.cpp's own `llama-server` with the same slots.

Both serve the same model with the same gene; the clients are OpenAI's, in a process of their
own, and load one server at a time, in turn: first with prompts that never come twice to a server,
then with prompts that all come again. Every answer of the first part is checked afterwards against
the prompts: one that is clearly likelier after another client's than after its own has crossed
over. LLAMA_SERVER names the peer's program (it is left out where it is not set), SERVE_SECONDS how
long each server is loaded in each part (240: twice two minutes).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, smollm2, table, write

CLIENTS, ROUNDS, TOKENS, CONTEXT = 32, 2, 48, 32 * 512
EACH = 2000  # prompts for a round: more than any server answers
AGAIN = 96  # prompts that come again: three times the slots
NATS = 5.0  # what counts as clearly likelier, over a whole answer
SECONDS = float(os.environ.get("SERVE_SECONDS", "240"))
GENE = Path(__file__).parents[2] / "safegene_edge" / "data" / "smollm2-135m.gene.gguf"


# -- the clients' process -----------------------------------------------------


async def load(url: str, seconds: float, prompts: list[str]) -> list[dict[str, Any]]:
    """What each request of 32 clients came to; half of them stream."""
    from openai import AsyncOpenAI

    found: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    model = (await client.models.list()).data[0].id

    async def ask(index: int, stream: bool) -> None:
        start = time.monotonic()
        entry: dict[str, Any] = {"prompt": index, "stream": stream}
        options: Any = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        try:
            answer = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompts[index]}],
                max_tokens=TOKENS,
                temperature=0,
                **options,
            )
            if stream:
                pieces = []
                async for chunk in answer:
                    if chunk.choices and chunk.choices[0].delta.content:
                        entry.setdefault("first", time.monotonic() - start)
                        pieces.append(chunk.choices[0].delta.content)
                    usage = chunk.usage
                entry |= {"text": "".join(pieces), "tokens": usage.completion_tokens}
            else:
                text = answer.choices[0].message.content
                entry |= {"text": text, "tokens": answer.usage.completion_tokens}
        except Exception as error:
            entry["error"] = repr(error)
        found.append(entry | {"seconds": time.monotonic() - start})

    async def one(number: int) -> None:
        turn = number
        while time.monotonic() < end:
            await ask(turn % len(prompts), turn % 2 == 0)
            turn += CLIENTS + 1

    start = time.monotonic()
    await asyncio.gather(*(one(number) for number in range(CLIENTS)))
    found.append({"wall": time.monotonic() - start})
    return found


def loaded(url: str, seconds: float, prompts: list[str], pid: int) -> dict[str, Any]:
    """One round: the clients run, and the server's memory is read every second."""
    command = [sys.executable, __file__, "--load", url, str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(prompts))
    process.stdin.close()
    memory = []
    with ExitStack() as stack:
        stack.callback(process.kill)
        while process.poll() is None and len(memory) < seconds:
            memory.append(rss(pid))
            time.sleep(1)
        *entries, last = json.loads(process.stdout.read())
    return {
        "entries": entries,
        "tokens_per_second": sum(e.get("tokens", 0) for e in entries) / last["wall"],
        "rss_mib": memory,
    }


# -- the servers --------------------------------------------------------------


def rss(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmRSS")]
    return round(int(line.split()[1]) / 1024, 1)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def started(stack: ExitStack, command: list[str], port: int) -> tuple[str, int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return url, process.pid
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"{command[0]} does not answer")


def servers(stack: ExitStack, model: Path) -> dict[str, tuple[str, int]]:
    port = free_port()
    ours = [sys.executable, "-m", "safegene_edge", "serve", str(model), "--gene", str(GENE),
            "--port", str(port), "--slots", str(CLIENTS), "--ctx", str(CONTEXT)]  # fmt: skip
    found = {"safegene-edge serve": started(stack, ours, port)}
    if program := os.environ.get("LLAMA_SERVER"):
        port = free_port()
        theirs = [program, "-m", str(model), "--lora", str(GENE), "--port", str(port),
                  "-np", str(CLIENTS), "-c", str(CONTEXT), "-fa", "on", "--kv-unified",
                  "-t", str(machine()["physical_cores"])]  # fmt: skip
        found["llama-server"] = started(stack, theirs, port)
    return found


# -- what came of it ----------------------------------------------------------


def crossed(model: Path, prompts: list[str], entries: list[dict[str, Any]]) -> dict[str, int]:
    """Answers that are clearly likelier after another client's prompt than after their own.

    The control swaps all answers on purpose: `caught` says how many of them the check finds
    (two refusals may be alike).
    """
    from safegene_edge import Engine, SafeLlama

    seen: dict[tuple[int, str], None] = dict.fromkeys(
        (e["prompt"], e["text"]) for e in entries if e.get("text")
    )
    pairs = list(seen)[:: max(1, len(seen) // 80)]
    with SafeLlama(model, [GENE]) as llama, Engine(llama) as engine:
        rendered = [llama.render([{"role": "user", "content": text}]) for text in prompts]
        answers = [llama.tokenize(t.encode(), add_bos=False, special=False) for _, t in pairs]
        own = engine.score([rendered[i] for i, _ in pairs], answers)
        others = [rendered[(i + CLIENTS + 1) % len(prompts)] for i, _ in pairs]
        other = engine.score(others, answers)
    apart = [float(a.sum()) - float(b.sum()) for a, b in zip(own, other, strict=True)]
    return {
        "checked": len(pairs),
        "crossed_over": sum(gain < -NATS for gain in apart),
        "caught": sum(gain > NATS for gain in apart),
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    entries = [entry for r in rounds for entry in r["entries"]]
    memory = [value for r in rounds for value in r["rss_mib"]]
    firsts = sorted(e["first"] for e in entries if "first" in e)
    errors = [e["error"] for e in entries if "error" in e]
    quarter = max(1, len(memory) // 4)
    return {
        "requests": len(entries),
        "errors": len(errors),
        "kinds_of_error": sorted(set(errors))[:5],
        "tokens_per_second": [round(r["tokens_per_second"], 1) for r in rounds],
        "first_token_seconds_median": round(statistics.median(firsts), 3) if firsts else None,
        "rss_mib_second_quarter": round(statistics.median(memory[quarter : 2 * quarter]), 1),
        "rss_mib_last_quarter": round(statistics.median(memory[-quarter:]), 1),
        "rss_mib": memory,
    }


def measured(
    running: dict[str, tuple[str, int]], prompts: list[str], each: int
) -> dict[str, list[dict[str, Any]]]:
    """Each server's rounds, in turn; a round has `each` prompts, the next ones where there are."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for number in range(ROUNDS):
        first = number * each % len(prompts)
        for name, (url, pid) in running.items():
            found = loaded(url, SECONDS / ROUNDS, prompts[first : first + each], pid)
            for entry in found["entries"]:
                entry["prompt"] += first
            rounds[name].append(found)
            speed = found["tokens_per_second"]
            print(f"round {number + 1}, {name}: {speed:.1f} tokens/s", file=sys.stderr)
    return rounds


def beside(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each server's summary, and the median of ours over the other's within a round."""
    ours, *theirs = rounds.values()
    ratios = [
        a["tokens_per_second"] / b["tokens_per_second"]
        for a, b in (zip(ours, theirs[0], strict=True) if theirs else ())
    ]
    return {
        "servers": {name: summary(found) for name, found in rounds.items()},
        "median_ratio": round(statistics.median(ratios), 3) if ratios else None,
    }


def shown(model: Path, results: dict[str, Any]) -> str:
    check, parts = results["crossing"], []
    header = ["server", "requests", "errors", "tokens/s in each round", "first token, s (median)",
              "RSS, MiB, second quarter", "last quarter"]  # fmt: skip
    for title, part in (("never come twice", results), ("come again", results["again"])):
        rows = [
            [name, s["requests"], s["errors"], ", ".join(map(str, s["tokens_per_second"])),
             s["first_token_seconds_median"], s["rss_mib_second_quarter"],
             s["rss_mib_last_quarter"]]
            for name, s in part["servers"].items()
        ]  # fmt: skip
        of = "Median of safegene-edge over llama-server within a round"
        ratio = f"\n{of}: {part['median_ratio']:.2f}.\n" if part["median_ratio"] else ""
        parts.append(f"## Prompts that {title}\n\n{table(header, rows)}{ratio}")
    return (
        f"# Server: {CLIENTS} clients, {results['seconds']:g} s, {model.name} with the gene\n\n"
        f"Half of the requests stream; {TOKENS} tokens at most each, {CLIENTS} slots; clients and "
        f"server share the machine. The servers are loaded in turn. {AGAIN} prompts come again.\n\n"
        + "\n".join(parts)
        + f"\nOf {check['checked']} different answers of safegene-edge to prompts that never come "
        f"twice, {check['crossed_over']} were likelier by {NATS:g} nats after another client's "
        "prompt than after their own; of as many swapped on purpose the same check finds "
        f"{check['caught']} (refusals are alike). That answers in company are exactly those given "
        "alone, the tests hold with a float32 model: here batching changes the order of sums.\n"
    )


def main() -> None:
    from safegene_edge.evals.asking.suites import load_suite

    model = smollm2()
    suites = [suite for name in ("harmful", "harmless") for suite in load_suite(name)]
    texts = [p.text for suite in suites for p in suite.sample(60).prompts]
    prompts = [f"{n}. {texts[n % len(texts)]}" for n in range(ROUNDS * EACH)]
    with ExitStack() as stack:
        running = servers(stack, model)
        rounds = measured(running, prompts, EACH)
        again = measured(running, [f"{text} Again." for text in texts[:AGAIN]], AGAIN)
    ours = next(iter(rounds.values()))
    results = {
        "model": model.name,
        "seconds": SECONDS,
        "clients": CLIENTS,
        **beside(rounds),
        "again": beside(again),
        "crossing": crossed(model, prompts, [e for r in ours for e in r["entries"]]),
    }
    write(Path(__file__).parent, results, shown(model, results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        url, seconds = sys.argv[2], float(sys.argv[3])
        print(json.dumps(asyncio.run(load(url, seconds, json.loads(sys.stdin.read())))))
    else:
        main()

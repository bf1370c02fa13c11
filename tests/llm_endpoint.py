"""A deterministic OpenAI-compatible endpoint on loopback, with latency and faults: what the tests and a benchmark ask.

    python tests/llm_endpoint.py --latency 0.1 --faults 0.1

prints its port and serves until its standard input closes. The answer to a prompt follows from the prompt alone; which
requests fail follows from the seed and their order. ``GET /stats`` tells what was asked so far.
"""

import argparse
import asyncio
import collections
import hashlib
import json
import math
import os
import random
import re
import sys

MODEL, KEY = "judge-1", "sk-test-key-of-the-endpoint"
FAULTS = ("429", "500", "503", "drop", "cut")


def digest_of(body):
    """What makes two requests the same prompt."""
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=8).hexdigest()


def share(digest):
    """A number in [0, 1) that follows from a digest."""
    return int(digest[:8], 16) / 2**32


class Endpoint:
    def __init__(self, options):
        self.options = options
        self.random = random.Random(options.seed)
        self.stats = collections.Counter()
        self.answered = collections.Counter()  # digest -> successful answers
        self.in_flight = 0
        self.last_body = None
        self.next_allowed = 0.0

    async def serve(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
                headers = {k.lower(): v for k, _, v in (h.partition(": ") for h in head.decode().split("\r\n")[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if path == "/stats":
                    self.send(writer, 200, self.report())
                elif not path.startswith(self.options.prefix + "/"):
                    self.send(writer, 404, {"detail": "Not Found"})
                elif not path.endswith("/chat/completions") or method != "POST":
                    self.send(writer, 404, {"error": {"message": f"no such path {path}"}})
                elif not await self.answer(writer, headers, json.loads(body)):
                    break
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def report(self):
        return {
            **self.stats,
            "distinct": len(self.answered),
            "successes": sum(self.answered.values()),
            "in_flight": self.in_flight,
            "last_body": self.last_body,
        }

    def send(self, writer, status, content, **headers):
        data = json.dumps(content).encode()
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    async def answer(self, writer, headers, body):
        """Answer one completion request; False where the connection is to be closed."""
        options = self.options
        self.stats["requests"] += 1
        self.last_body = body
        self.in_flight += 1
        self.stats["most_in_flight"] = max(self.stats["most_in_flight"], self.in_flight)
        await asyncio.sleep(options.latency)
        self.in_flight -= 1
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if options.key and key != options.key:
            self.send(writer, 401, {"error": {"message": f"Incorrect API key provided: {key}."}})
            return True
        if body["model"] != options.model:
            self.send(writer, 404, {"error": {"message": f"The model {body['model']!r} does not exist."}})
            return True
        for parameter in options.refuse:
            if parameter in body:
                message = f"Unsupported parameter: {parameter!r} is not supported with this model."
                self.send(writer, 400, {"error": {"message": message, "param": parameter}})
                return True
        if body.get("top_logprobs", 0) > options.most_top_logprobs:
            message = f"Invalid value: 'top_logprobs' must be at most {options.most_top_logprobs}."
            self.send(writer, 400, {"error": {"message": message}})
            return True
        now = asyncio.get_running_loop().time()
        if options.rate and now < self.next_allowed:
            self.stats["limited"] += 1
            self.send(writer, 429, {"error": {"message": "Rate limit"}}, retry_after=options.retry_after)
            return True
        self.next_allowed = max(now - 0.2, self.next_allowed) + 1 / (options.rate or 1)
        digest = digest_of(body)
        if self.stats["successes"] >= options.dies_after or self.random.random() < options.faults:
            return self.fail(writer, self.random.choice(options.kinds))
        if share(digest_of(body["messages"])) < options.filtered:
            self.stats["filtered"] += 1
            if self.stats["filtered"] % 2:
                error = {"message": "The response was filtered", "code": "content_filter"}
                self.send(writer, 400, {"error": error})
            else:
                self.send(writer, 200, completion(body, "", None, "content_filter"))
            return True
        self.answered[digest] += 1
        self.stats["successes"] += 1
        self.send(writer, 200, self.complete(body, digest))
        return True

    def fail(self, writer, kind):
        self.stats[f"fault {kind}"] += 1
        if kind == "drop":
            return False
        if kind == "cut":
            writer.write(b"HTTP/1.1 200 X\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{\"id\": ")
            return False
        if kind == "page":
            writer.write(b"HTTP/1.1 200 X\r\ncontent-type: text/html\r\ncontent-length: 13\r\n\r\n<html></html>")
            return True
        headers = {"retry_after": self.options.retry_after} if kind == "429" else {}
        self.send(writer, int(kind), {"error": {"message": self.options.message or f"fault {kind}"}}, **headers)
        return True

    def group_scores(self, messages):
        """An integer for each numbered document, which follows from its text; at first a wrong answer, as told."""
        texts = re.findall(r"^Document \d+: (.*)$", messages[0]["content"], re.M)
        scores = {str(number): int(share(digest_of(text)) * 11) for number, text in enumerate(texts, 1)}
        faults = self.options.groups
        if faults == "prose" or (faults == "first prose" and len(messages) == 1):
            return "All of them are quite good."
        if faults == "the rest" and len(messages) > 1:  # only what was missing
            return json.dumps(dict([scores.popitem()]))
        if faults in ("partial", "the rest") or (faults == "first partial" and len(messages) == 1):
            scores.popitem()
        if faults == "fenced":
            return f"<think>One by one.</think>```json\n{json.dumps(scores)}\n```"
        return json.dumps(scores)

    def complete(self, body, digest):
        part = share(digest)
        if self.options.shape:
            return misshapen(body, self.options.shape)
        if body.get("logprobs") and self.options.logprobs and share(digest[::-1]) >= self.options.silent:
            yes = 0.98 * part + 0.01
            tops = {" Yes": yes * 0.75, "yes": yes * 0.25, "No": (1 - yes) * 0.9, "yesterday": 0.01}
            top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in tops.items()]
            first = {"token": "Yes", "logprob": math.log(yes), "bytes": None, "top_logprobs": top}
            return completion(body, "Yes", {"content": [first]}, "stop")
        if "JSON object" in body["messages"][0]["content"]:
            return completion(body, self.group_scores(body["messages"]), None, "stop")
        if "0 to 100" in json.dumps(body["messages"]):
            return completion(body, f"{part * 100:.0f}" if part >= self.options.unreadable else "Hard to say.", None, "stop")
        if body.get("temperature"):
            return completion(body, f"A passage numbered {digest} about {body['messages'][-1]['content'][-60:]}", None, "stop")
        return completion(body, "Yes", None, "stop")


def misshapen(body, shape):
    """An answer as no endpoint should give it, and some do."""
    top = [{"token": "Yes", "logprob": math.nan if shape == "nan" else 0.0, "bytes": None}]
    first = {"token": "Yes", "logprob": 0.0, "bytes": None, "top_logprobs": "text" if shape == "text" else top}
    second = {**first, "top_logprobs": None}
    answer = completion(body, "nan", {"content": [second, first] if shape == "null top" else [first, second]}, "stop")
    if shape == "null top":
        first["top_logprobs"] = [{"token": "maybe", "logprob": 0.0, "bytes": None}]
    if shape == "null choice":
        answer["choices"] = [None]
    if shape == "null message":
        answer["choices"][0]["message"] = None
    return answer


def completion(body, text, logprobs, reason):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}
    usage = {"prompt_tokens": len(json.dumps(body["messages"])) // 4, "completion_tokens": max(1, len(text) // 4)}
    usage["total_tokens"] = sum(usage.values())
    return {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice], "usage": usage}


def parse_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds an answer takes")
    parser.add_argument("--rate", type=float, help="answers a second; beyond that 429")
    parser.add_argument("--shape", help="answer with something that is none")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that fail")
    parser.add_argument("--kinds", nargs="+", default=list(FAULTS), help="how they fail")
    parser.add_argument("--retry_after", default="0.05")
    parser.add_argument("--message", help="what failing requests say")
    parser.add_argument("--filtered", type=float, default=0.0, help="share of prompts that the content filter refuses")
    parser.add_argument("--unreadable", type=float, default=0.0, help="share of prompts whose number is none")
    parser.add_argument("--groups", help="how scores of groups are wrong: prose, partial, first prose, first partial, the rest, fenced")
    parser.add_argument("--logprobs", type=int, default=1)
    parser.add_argument("--most_top_logprobs", type=int, default=20)
    parser.add_argument("--silent", type=float, default=0.0, help="share of prompts answered without logprobs")
    parser.add_argument("--refuse", nargs="*", default=[], help="parameters that end in a 400")
    parser.add_argument("--dies_after", type=float, default=math.inf, help="answers after which every request fails")
    parser.add_argument("--key", default=KEY)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--prefix", default="/v1")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


async def main():
    endpoint = Endpoint(parse_options())
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", endpoint.options.port, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # open connections and all


if __name__ == "__main__":
    asyncio.run(main())

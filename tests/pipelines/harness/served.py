"""The micro policy behind OpenAI's chat interface on loopback: a real server, a real model."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trace_opd.pipelines.models import MICRO
from trace_opd.pipelines.samplers import sampling_engine
from trace_opd.schemas.configs import PolicyConfig, SamplingConfig, TransformersSampler
from trace_opd.trace.prompt import render_chat
from trace_opd.trace.protocols import Prompt


@contextmanager
def serving_micro() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The server's base URL, and the requests that it gets."""
    sampler, tokenizer = sampling_engine(
        TransformersSampler(), PolicyConfig(path=str(MICRO))
    ).open()
    assert tokenizer is not None
    asked: list[dict[str, Any]] = []
    one_at_a_time = threading.Lock()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        messages = body["messages"]
        sampling = SamplingConfig(
            temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0),
            top_k=body.get("top_k", 0),
            max_new_tokens=body.get("max_tokens") or body.get("max_completion_tokens") or 16,
        )
        prompt = Prompt(messages, render_chat(tokenizer, messages))
        with one_at_a_time:
            asked.append(body)
            ((made,),) = sampler.sample([prompt], sampling, [[body.get("seed") or 0]])
        message = {"role": "assistant", "content": made.text}
        choice = {"index": 0, "message": message, "finish_reason": str(made.finish_reason)}
        usage = {"prompt_tokens": len(prompt.token_ids or []), "completion_tokens": 1}
        usage["total_tokens"] = sum(usage.values())
        about = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        return about | {"choices": [choice], "usage": usage}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            content = json.dumps(answer(body)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        with closing(sampler):
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

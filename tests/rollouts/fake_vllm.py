"""A vLLM server for tests: its HTTP interface, and completions that are a function of weights, prompt and seed.

Standard library only: as a process it is up in a tenth of a second. What is asked of it as vLLM 0.32 has it is written
down; what vLLM would refuse is refused.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEYS = {
    *("n", "seed", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "ignore_eos", "stop_token_ids", "logprobs", "detokenize"),
}


def shapes_in(folder):
    """Of the tensors in a safetensors file, by name; its header is JSON behind eight bytes of its length."""
    content = Path(folder, "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: x["shape"] for name, x in header.items() if name != "__metadata__"}


def digest(folder):
    return hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest()


def completion(weights, prompt, params, sample):
    """Token ids and log-probs; one in three ends with a stop token."""
    seed = 0 if params["temperature"] == 0 else params["seed"] + sample
    stream = hashlib.sha256(f"{weights} {prompt} {seed}".encode()).digest() * 8
    ids = []
    for byte in stream[: params["max_tokens"]]:
        ids.append(params["stop_token_ids"][0] if byte % 8 == 0 else 2 + byte % 20)
        if ids[-1] in params["stop_token_ids"]:
            break
    return ids, [-(1 + t) / 100 for t in ids]


class Fake(ThreadingHTTPServer):
    """Args: folder with weights to begin with, port, and what goes wrong: a name of a file in `faults`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder, port=0, faults=None, dev_mode=True, scale_out=True, key=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.weights, self.version = (digest(folder) if folder else "none"), "default"
        self.faults = Path(faults) if faults else None
        self.dev_mode, self.scale_out, self.key = dev_mode, scale_out, key
        self.asked = []  # (path, body) in order
        self.at_once = self.most = 0
        self.hang = threading.Event()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fault(self, name):
        """Whether this goes wrong now, once: the file is gone afterwards."""
        file = self.faults and self.faults / name
        with self.lock:
            if file and file.exists():
                left = int(file.read_text() or 1) - 1
                file.write_text(str(left)) if left else file.unlink()
                return True
        return False

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.hang.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        server.asked.append((self.path, body))
        if server.fault("hang"):
            server.hang.wait(60)
        if self.path == "/inference/v1/generate" and server.scale_out:
            return self.generate(body)
        if not server.dev_mode:
            return self.answer(404, {"detail": "Not Found"})
        if self.path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            try:
                server.weights = digest(body["kwargs"]["weights_path"])
                server.shapes = shapes_in(body["kwargs"]["weights_path"])
            except OSError:
                return self.answer(500, {"error": {"message": "Repo id must be in the form 'repo_name'"}})
            return self.answer(200, {"results": [None]})
        if self.path == "/reset_prefix_cache":
            return self.answer(200, {"success": not server.fault("busy")})
        if self.path == "/update_weight_version":
            server.version = body["new_version"]
            return self.answer(200, {"success": True})
        return self.answer(404, {"detail": "Not Found"})

    def generate(self, body):
        server, params = self.server, body["sampling_params"]
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self.answer(401, {"error": "Unauthorized"})
        if server.fault("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if server.fault("broken"):
            return self.answer(500, {"error": {"message": "EngineCore encountered an issue"}})
        if set(params) != KEYS or (params["temperature"] == 0 and params["n"] > 1) or params["seed"] >= 2**63:
            return self.answer(400, {"error": {"message": f"bad sampling params {sorted(set(params) ^ KEYS)}"}})
        if params["n"] > 128:
            return self.answer(400, {"error": {"message": "n must be at most the server's max_num_seqs"}})
        if len(body["token_ids"]) > 100:
            return self.answer(400, {"error": {"message": "the prompt is longer than max_model_len"}})
        with server.lock:
            server.at_once += 1
            server.most = max(server.most, server.at_once)
        choices = []
        for index in reversed(range(params["n"])):
            ids, logprobs = completion(server.weights, body["token_ids"], params, index)
            content = [{"token_id": t, "logprob": x, "rank": 1} for t, x in zip(ids, logprobs, strict=True)]
            versions = [{"version": server.version, "start": 0, "end": len(ids)}]
            choices.append(
                {"index": index, "token_ids": ids, "logprobs": {"content": content}, "weight_versions": versions}
            )
        with server.lock:
            server.at_once -= 1
        return self.answer(200, {"choices": choices})

    def answer(self, status, content=None):
        sent = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)


def main():
    """`fake_vllm.py FOLDER PORT FAULTS`; it says what it was started with."""
    folder, port, faults = sys.argv[1:4]
    print(" ".join(sys.argv), flush=True)
    if Path(faults, "refuses").exists():
        print("ValueError: Head size 8 is not supported", flush=True)
        sys.exit(1)
    if Path(faults, "silent").exists():
        threading.Event().wait()
    server = Fake(folder, int(port), faults)
    Path(faults, "environment.json").write_text(json.dumps(dict(os.environ)))
    server.serve_forever()


if __name__ == "__main__":
    main()

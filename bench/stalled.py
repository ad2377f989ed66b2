"""Measure the memory of `wavear serve` while two clients are stalled.

    python bench/stalled.py [CHECKPOINT] [--minutes 10]

One is a page whose script hangs: it answers pings, as a browser does by itself, and reports
nothing. The other reads nothing, answers no pings, and reports every second to have heard all.
Prints the server's resident memory every 30 s, and when the server hung up. Linux only.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

REPORT = json.dumps({"heard": 2**31, "epoch": 0})


def upload(port: int) -> str:
    """Upload three seconds of a tone; return its number."""
    tone = 0.5 * np.sin(2 * np.pi * 300 * np.arange(3 * 22050) / 22050)
    file = io.BytesIO()
    soundfile.write(file, tone, 22050, format="WAV")
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Origin": f"http://127.0.0.1:{port}"}
    connection.request("POST", "/recordings?name=tone.wav", file.getvalue(), headers)
    return json.loads(connection.getresponse().read())["id"]


def stalled(port: int, settings: dict[str, object]) -> socket.socket:
    """Open the live stream and start it."""
    client = socket.create_connection(("127.0.0.1", port))
    key = base64.b64encode(os.urandom(16)).decode()
    client.sendall(
        f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
        f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    client.recv(4096)  # the answer to the handshake
    say(client, json.dumps(settings))
    return client


def say(client: socket.socket, text: str | bytes) -> bool:
    """Send a text, or a pong, with the mask 0; return False if the server hung up."""
    data = text.encode() if isinstance(text, str) else text
    kind = 0x81 if isinstance(text, str) else 0x8A
    try:
        client.sendall(bytes([kind, 0x80 | len(data), 0, 0, 0, 0]) + data)
    except OSError:
        return False
    return True


def answer_pings(client: socket.socket, unread: bytearray) -> bool:
    """Read what has come, and answer pings; return False if the server hung up."""
    client.setblocking(False)
    try:
        while part := client.recv(2**20):
            unread += part
        return False
    except BlockingIOError:
        pass
    except OSError:
        return False
    finally:
        client.setblocking(True)
    while len(unread) > 3:
        long = unread[1] == 126
        start = 4 if long else 2
        stop = start + (int.from_bytes(unread[2:4], "big") if long else unread[1])
        if len(unread) < stop:
            break
        if unread[0] == 0x89 and not say(client, bytes(unread[start:stop])):
            return False
        del unread[:stop]
    return True


def resident(process: int) -> int:
    """Return the resident memory of a process in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) // 1024


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="*")
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    command = [sys.executable, "-m", "wavear", "serve", *args.checkpoint, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        settings: dict[str, object] = {"recording": upload(port)}
        paused, claiming = stalled(port, settings), stalled(port, settings)
        alive, unread = {"paused": True, "claiming": True}, bytearray()
        for second in range(math.ceil(60 * args.minutes) + 1):
            now = {"paused": answer_pings(paused, unread), "claiming": say(claiming, REPORT)}
            for name in [name for name in alive if alive[name] and not now[name]]:
                print(f"{second:4d} s: the server closed the client that is {name}")
                alive[name] = False
            if second % 30 == 0:
                print(f"{second:4d} s: {resident(process.pid)} MiB", flush=True)
            time.sleep(1)
        process.terminate()


if __name__ == "__main__":
    main()

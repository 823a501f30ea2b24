"""The least that a debug server in Python can do: wait, receive, send the same reply each time.

(But for the one by which a client stops to send acknowledgements.)

Run as a program, with the bytes of the reply's payload as its argument; it prints its port.  What
it reaches is the most that any server of one packet at a time in this Python can.
"""

from __future__ import annotations

import select
import socket
import sys


def main() -> None:
    """Serve one client until it goes away."""
    payload = b"0" * int(sys.argv[1])
    reply, agreed = (b"$%b#%02x" % (p, sum(p) & 0xFF) for p in (payload, b"OK"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        client, _ = listener.accept()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    poll = select.poll()
    poll.register(client, select.POLLIN)
    while True:
        poll.poll()
        data = client.recv(1 << 14)
        if not data:
            return
        if b"#" in data:  # not an acknowledgement
            client.send(agreed if b"NoAckMode" in data else reply)


if __name__ == "__main__":
    main()

"""Two threads may close a connection at once; it is nobody else's that is closed."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress

from dicom_node.sockets import close


class Interrupted(socket.socket):
    """A socket whose first thread to shut it down loses the processor there, the descriptor's number in its hand."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(fileno=descriptor)
        self.is_within, self.goes_on = threading.Event(), threading.Event()

    def shutdown(self, how: int) -> None:
        number = self.fileno()
        if number < 0:
            raise OSError
        if not self.is_within.is_set():
            self.is_within.set()
            self.goes_on.wait(10)
        same = socket.socket(fileno=number)
        try:
            same.shutdown(how)
        finally:
            same.detach()


def test_a_connection_that_is_accepted_meanwhile_stays_open():
    ours, theirs = socket.socketpair()
    number = os.dup(ours.fileno())
    ended = Interrupted(number)
    first, second = (threading.Thread(target=close, args=(ended,)) for _ in range(2))
    first.start()
    assert ended.is_within.wait(10)
    second.start()
    second.join(0.5)  # unless it waits for the first, it has closed by now, and the number is free

    accepted, peer = socket.socketpair()
    if ended.fileno() < 0:
        os.dup2(accepted.fileno(), number)  # as the kernel gives it to the next
    ended.goes_on.set()
    first.join(10)
    second.join(10)

    with suppress(BrokenPipeError):
        accepted.sendall(b"still here")
    assert peer.recv(100) == b"still here"
    assert ended.fileno() < 0
    for each in (ours, theirs, accepted, peer):
        each.close()

"""A client that lies: under `guestmem run` it speaks nonsense to the server. Ends with 0 if the server is alive."""

from __future__ import annotations

import os
import random
import socket
import struct

from guestmem.serve.wire import VERSION

REQUEST = struct.Struct("<IIQQQQQ")
HELLO, OPEN, IDENTIFY, IOCTL, UPCALL_DONE = 1, 2, 3, 4, 17
EXTREMES = (0, 1, 4095, 4096, 1 << 31, 1 << 32, (1 << 47) - 4096, 1 << 47, 1 << 63, (1 << 64) - 1)


def connect() -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.settimeout(5)
    channel.connect(os.environ["GUESTMEM_SOCKET"])
    return channel


def hello(channel: socket.socket, version: int = VERSION, number: int = 0) -> None:
    channel.send(REQUEST.pack(HELLO, 0, 0, version, 0, number, 0))
    channel.recv(1 << 16)


def speak(channel: socket.socket, message: bytes) -> bool:
    """Whether the server still listens. Upcalls are left unanswered or answered with nonsense."""
    try:
        channel.send(message)
        channel.settimeout(0.02)
        channel.recv(1 << 16)
    except TimeoutError:
        return True
    except OSError:
        return False
    return True


def nonsense(choose: random.Random) -> bytes:
    words = [choose.choice(EXTREMES) if choose.random() < 0.7 else choose.getrandbits(64) for _ in range(5)]
    return REQUEST.pack(choose.randrange(0, 24), choose.getrandbits(32), *words) + choose.randbytes(
        choose.choice((0, 7, 300))
    )


def files(choose: random.Random) -> list[int]:
    """Inode numbers that may be somebody's: those of our own descriptors and their neighbours."""
    numbers = [os.fstat(int(fd)).st_ino for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    return [number + delta for number in numbers for delta in range(-3, 40)] + [choose.getrandbits(32)]


def main() -> None:
    choose = random.Random(7)
    connect().close()  # says nothing at all
    short = connect()
    short.send(b"x")  # no message
    early = connect()
    speak(early, REQUEST.pack(OPEN, 0, 0, 1, 0, 0, 0))  # before HELLO
    hello(connect(), version=99)
    hello(connect(), number=1)  # somebody else's number
    for _ in range(40):
        channel = connect()
        hello(channel)
        for _ in range(25):
            if not speak(channel, nonsense(choose)):
                break
        channel.close()
    channel = connect()
    hello(channel)
    for number in files(choose):
        for request in (0xAE80, 0xC040AED4, 0x4020AE46, 0x8090AE81):
            if not speak(channel, REQUEST.pack(IOCTL, 0, number, request, choose.choice(EXTREMES), 0, 0)):
                channel = connect()
                hello(channel)
    speak(channel, REQUEST.pack(UPCALL_DONE, 0, 0, 0, 0, 0, 0))  # nobody asked
    last = connect()
    hello(last)
    last.send(REQUEST.pack(OPEN, 0, 0, 1, 0, 0, 0))
    assert struct.unpack_from("<Ii", last.recv(1 << 16)) == (0, 0), "the server does not open /dev/kvm any more"


if __name__ == "__main__":
    main()

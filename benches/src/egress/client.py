# The client of `chitin-bench egress`, the same on the host and in a sandbox.
#
#   python3 client.py TLS-PORT PLAIN-PORT COUNT BYTES CERTIFICATE
#
# Prints one line for each request, in nanoseconds: until everything was received, and from the first byte of the
# answer on. Then the same for connections that receive one byte. The first of each finds everything cold and is not
# counted.
import os, socket, ssl, sys, time

port, plain, count, size = map(int, sys.argv[1:5])
context = ssl.create_default_context(cadata=sys.argv[5] or None)
request = (
    f"GET /{size} HTTP/1.1\r\n"
    f"Host: localhost:{port}\r\n"
    f"X-Key: {os.environ['CHITIN_BENCH_KEY']}\r\n"
    "Connection: close\r\n\r\n"
)
buffer = bytearray(1 << 18)
now = time.perf_counter_ns
for i in range(count + 1):
    began = now()
    with socket.create_connection(("127.0.0.1", port)) as s, context.wrap_socket(s, server_hostname="localhost") as t:
        t.sendall(request.encode())
        got = t.recv_into(buffer)
        first = now()
        while n := t.recv_into(buffer):
            got += n
        ended = now()
    if got <= size:
        sys.exit(f"an answer of {got} bytes")
    if i:
        print(ended - began, ended - first)
for i in range(count + 1):
    began = now()
    with socket.create_connection(("127.0.0.1", plain)) as s:
        s.sendall(b"x")
        s.recv(1)
        ended = now()
    if i:
        print(ended - began, 0)

# A Python server that keeps running in every copy of a template. It executes the code that a client sends to port 8000 of
# the sandbox, up to the end of the input, and answers with the output of that code.
#
#   chitin template build python --warm-up "$(cat examples/warm-python.sh)"
#   chitin run --template python -p 8000:8000 -- sleep 600
#
# A program reaches it with `Sandbox::connect(8000)`; `-p` forwards a port of the host to it.
cat >/tmp/serve.py <<'END'
import contextlib, io, json, socket, ssl, traceback

server = socket.create_server(("127.0.0.1", 8000))
while True:
    connection, _ = server.accept()
    code = b"".join(iter(lambda: connection.recv(65536), b""))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc(file=printed)
    connection.sendall(printed.getvalue().encode())
    connection.close()
END
python3 /tmp/serve.py >/dev/null 2>&1 &
# Wait until the server answers, so that it is running when the template is saved.
ask='import socket; s = socket.create_connection(("127.0.0.1", 8000)); s.sendall(b"print(1)"); s.shutdown(1); s.recv(9)'
until python3 -c "$ask" 2>/dev/null; do sleep 0.1; done

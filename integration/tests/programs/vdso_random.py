# Draws random numbers as a C library does that calls getrandom(2) in the vDSO: from a generator whose
# state is in this process, and which the kernel tells to reseed by a counter in a shared page. Writes
# each number to /tmp/draws.
import ctypes, struct, time
libc = ctypes.CDLL(None)
libc.getauxval.restype = ctypes.c_ulong
base = libc.getauxval(ctypes.c_ulong(33))
def fields(form, at):
    return struct.unpack(form, ctypes.string_at(base + at, struct.calcsize(form)))
table, count = fields("<Q", 32)[0], fields("<H", 56)[0]
heads = [fields("<IIQQQQQQ", table + 56 * index) for index in range(count)]
dynamic = next(head[2] for head in heads if head[0] == 2)
tags = dict(fields("<QQ", dynamic + 16 * index) for index in range(64))
strings, symbols = tags[5], tags[6]
for at in range(symbols, strings, 24):
    name, value = fields("<I", at)[0], fields("<Q", at + 8)[0]
    if ctypes.string_at(base + strings + name) == b"__vdso_getrandom":
        break
draw = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint,
                        ctypes.c_void_p, ctypes.c_size_t)(base + value)
parameters = (ctypes.c_uint32 * 16)()
assert draw(None, 0, 0, parameters, 2**64 - 1) == 0
size, protection, flags = parameters[:3]
libc.mmap.restype = ctypes.c_void_p
state = libc.mmap(None, ctypes.c_size_t(4096), protection, flags, -1, ctypes.c_long(0))
out = ctypes.create_string_buffer(16)
with open("/tmp/draws", "w", buffering=1) as file:
    while True:
        assert draw(out, 16, 0, state, size) == 16
        file.write(out.raw.hex() + "\n")
        time.sleep(0.05)

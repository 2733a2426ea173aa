"""Completes an unpacked root tree: trust roots, bytecode, and a check of shared libraries.

`cargo xtask rootfs` runs it with the interpreter of the tree, so that the builder needs no Python
and the bytecode is of the right version. One process does everything in sorted order: two runs give
the same bytes.
"""

import ctypes
import os
import py_compile
import ssl
import struct
import sys

MODULES = ("usr/lib/python3.11", "usr/lib/python3/dist-packages")
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib")


def list_files(tree, below=""):
    """Yields the paths of regular files, relative to the tree, sorted; links are not followed."""
    for directory, directories, names in os.walk(os.path.join(tree, below)):
        directories.sort()
        for name in sorted(names):
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield os.path.relpath(path, tree)


def subject_hash_function(tree):
    """Returns a function from DER to the file name by which OpenSSL finds a certificate."""
    crypto = ctypes.CDLL(os.path.join(tree, "usr/lib/x86_64-linux-gnu/libcrypto.so.3"))
    crypto.d2i_X509.restype = ctypes.c_void_p
    crypto.d2i_X509.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_long]
    crypto.X509_subject_name_hash.restype = ctypes.c_ulong
    crypto.X509_subject_name_hash.argtypes = [ctypes.c_void_p]

    def name_of(der):
        certificate = crypto.d2i_X509(None, ctypes.byref(ctypes.c_char_p(der)), len(der))
        if not certificate:
            raise SystemExit("OpenSSL cannot read one of the certificates")
        return f"{crypto.X509_subject_name_hash(certificate) & 0xFFFFFFFF:08x}"

    return name_of


def install_trust_roots(tree):
    """Does the work of update-ca-certificates: one bundle, and a link for each certificate, named
    by the hash of its subject."""
    name_of = subject_hash_function(tree)
    certs = os.path.join(tree, "etc/ssl/certs")
    os.makedirs(certs, exist_ok=True)
    bundle, taken = [], {}
    for path in list_files(tree, "usr/share/ca-certificates"):
        if not path.endswith(".crt"):
            continue
        with open(os.path.join(tree, path), encoding="ascii") as source:
            pem = source.read()
        bundle.append(pem if pem.endswith("\n") else pem + "\n")
        name = name_of(ssl.PEM_cert_to_DER_cert(pem))
        number = taken[name] = taken.get(name, -1) + 1
        os.symlink("/" + path, os.path.join(certs, f"{name}.{number}"))
    if len(bundle) < 50:
        raise SystemExit(
            f"only {len(bundle)} trust roots: has the layout of ca-certificates changed?"
        )
    with open(os.path.join(certs, "ca-certificates.crt"), "w", encoding="ascii") as target:
        target.write("".join(bundle))
    return len(bundle)


def compile_bytecode(tree):
    """Compiles the standard library and Debian's modules, unchecked: the image cannot change, so
    Python need not compare times."""
    count = 0
    for path in [path for below in MODULES for path in list_files(tree, below)]:
        if path.endswith(".py"):
            py_compile.compile(
                os.path.join(tree, path),
                dfile="/" + path,
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            count += 1
    return count


def needed_libraries(path):
    """Returns the names of the shared libraries that an ELF file needs; none for other files."""
    with open(path, "rb") as source:
        data = source.read()
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    offset, size, count = struct.unpack_from("<Q14xHH", data, 32)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + size * index) for index in range(count)]

    def file_offset(address):
        for kind, _, start, virtual, _, length in headers:
            if kind == 1 and virtual <= address < virtual + length:
                return start + address - virtual
        raise SystemExit(f"{path}: dynamic section points outside the file")

    for kind, _, start, _, _, length in headers:
        if kind == 2:
            entries = list(struct.iter_unpack("<QQ", data[start : start + length]))
            strings = file_offset(next(value for tag, value in entries if tag == 5))
            begins = [strings + value for tag, value in entries if tag == 1]
            return [data[begin : data.index(b"\0", begin)].decode() for begin in begins]
    return []


def check_libraries(tree):
    """Fails if a program or library needs a library that was skipped or pruned."""
    present = set()
    for directory in LIBRARIES:
        present.update(os.listdir(os.path.join(tree, directory)))
    missing, count = [], 0
    for path in list_files(tree, "usr"):
        names = needed_libraries(os.path.join(tree, path))
        count += bool(names)
        missing += [f"{path} needs {name}" for name in names if name not in present]
    if missing:
        raise SystemExit("libraries are missing:\n  " + "\n  ".join(missing))
    return count


def main():
    tree = os.path.abspath(sys.argv[1])
    roots = install_trust_roots(tree)
    modules = compile_bytecode(tree)
    programs = check_libraries(tree)
    print(f"{roots} trust roots, {modules} compiled modules, libraries of {programs} programs found")


main()

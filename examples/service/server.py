"""A service in the guest: files of its disk at /files/N, and at /pages/N pages made from rows of an SQLite database.

    python3 -B server.py --start        # returns once it listens, on port 80

Each answer carries the SHA-256 that its content had when it was made (Repr-Digest, RFC 9530): for a page the one that
was written into the database beside its text, for a file the one it had when the service started.
"""

import base64
import hashlib
import http.server
import os
import random
import sqlite3
import sys
import threading

DATABASE = "/srv/pages.sqlite"
PAGES = 2000
FILES = 256
BETWEEN = range(8 << 10, 128 << 10)
LETTERS = 6000


def build() -> None:
    """Fill the database, the same one every time."""
    made = sqlite3.connect(DATABASE + ".new")
    made.execute("CREATE TABLE page (id INTEGER PRIMARY KEY, title TEXT, text TEXT, digest BLOB)")
    for number in range(PAGES):
        title = "Page %d" % number
        text = base64.b64encode(random.Random(number).randbytes(LETTERS * 3 // 4)).decode()
        made.execute("INSERT INTO page VALUES (?, ?, ?, ?)", (number, title, text, digest(page(title, text))))
    made.commit()
    made.close()
    os.rename(DATABASE + ".new", DATABASE)
    os.sync()


def page(title: str, text: str) -> bytes:
    return ("<!DOCTYPE html>\n<title>%s</title>\n<h1>%s</h1>\n<p>%s</p>\n" % (title, title, text)).encode()


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def some_files() -> list:
    found = []
    for folder, _, names in os.walk("/usr"):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path) and os.path.getsize(path) in BETWEEN:
                found.append(path)
    chosen = random.Random(1).sample(sorted(found), FILES)
    return [(path, digest(read(path))) for path in chosen]


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # With the usual five, a sixth connection of the same moment waits a second for its SYN to be sent again.
    request_queue_size = 128


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer is written in one piece.
    wbufsize = -1
    disable_nagle_algorithm = True
    files = []
    own = threading.local()

    def do_GET(self) -> None:
        kind, _, number = self.path[1:].partition("/")
        if kind == "files" and number.isdecimal() and int(number) < FILES:
            path, known = self.files[int(number)]
            self.answer(read(path), known, "application/octet-stream")
        elif kind == "pages" and number.isdecimal() and int(number) < PAGES:
            row = self.database().execute("SELECT title, text, digest FROM page WHERE id = ?", (int(number),))
            title, text, known = row.fetchone()
            self.answer(page(title, text), known, "text/html")
        else:
            self.send_error(404)

    def database(self) -> sqlite3.Connection:
        if not hasattr(self.own, "database"):
            self.own.database = sqlite3.connect("file:%s?mode=ro" % DATABASE, uri=True)
            # What it keeps is kept by the guest's page cache; a second copy would only hide that.
            self.own.database.execute("PRAGMA cache_size=-64")
        return self.own.database

    def answer(self, content: bytes, known: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Repr-Digest", "sha-256=:%s:" % base64.b64encode(known).decode())
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        pass


def main() -> None:
    if not os.path.exists(DATABASE):
        build()
    Handler.files = some_files()
    server = Server(("", 80), Handler)
    if "--start" in sys.argv[1:]:
        if os.fork():
            os._exit(0)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
    server.serve_forever()


main()

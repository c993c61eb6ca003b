"""Remedies: what to do about each thing that keeps a study from writing its files.

remedy_for(OperationalError: database is locked)  ──> end the other process that writes there ...; empty where it is a bug
"""

import errno
import sqlite3

AGAIN = "then start the study again: nothing that was measured before is lost"
DAMAGED = "put back a copy of the study's folder; without one, `study delete` it and run it anew"

_FULL = f"free some space there, {AGAIN}"
_QUOTA = f"free some of your quota there, or have it raised, {AGAIN}"
_READ_ONLY = f"see that the disk is mounted for writing and that you may write the file and its folder, {AGAIN}"
_BROKEN = f"free some space there if it is full; else see in the system's log what is wrong with the disk or the network to it, {AGAIN}"
_LARGE = f"let files grow larger (`ulimit -f`), {AGAIN}"
_LOCKED = f"end the other process that holds the file, such as a database viewer or a backup (`fuser FILE` names it), {AGAIN}"
_UNOPENED = "see that the folder is there and that you may read and write in it, and that processes may open more files (`ulimit -n`)"

_SYSTEM = {errno.ENOSPC: _FULL, errno.EDQUOT: _QUOTA, errno.EFBIG: _LARGE, errno.EROFS: _READ_ONLY, errno.EIO: _BROKEN}

_SQLITE = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_IOERR: _BROKEN,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_CANTOPEN: _UNOPENED,
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
}


def remedy_for(error: OSError | sqlite3.Error) -> str:
    """What the user can do about it; empty where nothing is wrong with the disk, the file or their rights."""
    if isinstance(error, OSError):
        return _SYSTEM.get(error.errno or 0, "")
    # The low byte of SQLite's codes is the kind; errors of Python's module itself have none.
    return _SQLITE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "")

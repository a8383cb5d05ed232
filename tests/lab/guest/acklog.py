#!/usr/bin/python3
"""Changes files under a mounted directory and says which change was answered.

  lab-acklog DIR WORKER SEED

Each line on standard output names one change that the server has answered as durable, printed
only after the answer: the caller keeps the lines, cuts the server's power and compares. The
program runs until it is killed. Operations, drawn by SEED:

  W NAME OFFSET LENGTH BYTE   written through O_SYNC (FILE_SYNC on the wire)
  C NAME OFFSET LENGTH BYTE   written, then fsync (WRITE UNSTABLE and COMMIT)
  N NAME                      created
  R OLD NEW                   renamed
  D NAME                      removed
  M NAME | X NAME             directory made, removed

A change that was begun but not answered is announced with "?" in front: it may be there or not.

A server that lost its power has lost its reply cache too, so a repeated RENAME, REMOVE, MKDIR or
RMDIR finds its own work done. Only that is forgiven; any other error ends the program.
"""
import contextlib, os, random, sys

LENGTH_MAX = 16384
FILES_MAX = 24
FILES_MIN = 4


def main():
    root, worker, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rng = random.Random(f'{seed}/{worker}')
    home = os.path.join(root, worker)
    os.makedirs(home, exist_ok=True)
    files, dirs, serial = [], [], 0

    def change(line, act):
        print('?', line, flush=True)
        act()
        print(line, flush=True)

    def path(name):
        return os.path.join(home, name)

    def rename(old, new):
        try:
            os.rename(path(old), path(new))
        except FileNotFoundError:
            if not os.path.exists(path(new)):
                raise

    def forgiving(error, act, name):
        with contextlib.suppress(error):
            act(path(name))

    def write(name, offset, length, byte, flags):
        fd = os.open(path(name), os.O_WRONLY | flags)
        try:
            if os.pwrite(fd, bytes([byte]) * length, offset) != length:
                raise OSError('short write')
            if not flags:
                os.fsync(fd)
        finally:
            os.close(fd)

    while True:
        serial += 1
        kind = rng.choice('NWWWCCCRDMX')
        if kind == 'N' and len(files) < FILES_MAX or not files:
            name = f'f{serial}'
            change(f'N {worker}/{name}', lambda: os.close(
                os.open(path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)))
            files.append(name)
        elif kind in 'WC':
            name, offset = rng.choice(files), rng.randrange(64) * 1000
            length, byte = rng.randrange(1, LENGTH_MAX), rng.randrange(1, 256)
            change(f'{kind} {worker}/{name} {offset} {length} {byte}',
                   lambda: write(name, offset, length, byte, os.O_SYNC if kind == 'W' else 0))
        elif kind == 'R':
            old, new = rng.choice(files), f'r{serial}'
            change(f'R {worker}/{old} {worker}/{new}', lambda: rename(old, new))
            files[files.index(old)] = new
        elif kind == 'D' and len(files) > FILES_MIN:
            name = files.pop(rng.randrange(len(files)))
            change(f'D {worker}/{name}', lambda: forgiving(FileNotFoundError, os.unlink, name))
        elif kind == 'M':
            name = f'd{serial}'
            change(f'M {worker}/{name}', lambda: forgiving(FileExistsError, os.mkdir, name))
            dirs.append(name)
        elif kind == 'X' and dirs:
            name = dirs.pop()
            change(f'X {worker}/{name}', lambda: forgiving(FileNotFoundError, os.rmdir, name))


main()

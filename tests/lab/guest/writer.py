#!/usr/bin/python3
"""Writes records to a file of a mounted export, and says when each was answered as durable.

  lab-writer FILE [PAUSE_MS]

Record N is 64 bytes at 4096 * N: "record N", filled up with dots, and a line's end. It is written,
brought to disk with fsync, and then told on standard output as "N BEGIN END", by the machine's
wall clock in seconds. The next one follows after a pause of 20 ms. Goes on until it is killed; an
error ends it with a line "failed ERROR".

Each has a page of its own: a client writes a page from its beginning, so what a server has lost
would come again with the next record of the page, and nobody would notice.
"""
import errno, os, sys, time

RECORD_BYTES = 64
PAGE_BYTES = 4096


def main():
    path, pause = sys.argv[1], int(sys.argv[2]) / 1000 if len(sys.argv) > 2 else 0.02
    number = 0
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        while True:
            record = b'record %d' % number
            record = record.ljust(RECORD_BYTES - 1, b'.') + b'\n'
            began = time.time()
            if os.pwrite(fd, record, number * PAGE_BYTES) != RECORD_BYTES:
                raise OSError(errno.EIO, 'short write')
            os.fsync(fd)
            print(f'{number} {began:.6f} {time.time():.6f}', flush=True)
            number += 1
            time.sleep(pause)
    except OSError as err:
        print('failed', errno.errorcode.get(err.errno, err.errno), flush=True)
        sys.exit(1)


main()

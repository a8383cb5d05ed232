#!/usr/bin/python3
"""Takes locks on files, as it is told or at random, and says what it got and when.

  lab-locktool actors
  lab-locktool traffic FILE WORKERS SECONDS SEED

Each line on standard output begins with the machine's wall clock in seconds and the name of the
process that the line is about. Every process is a lock owner of its own.

With "actors", each line of input is the name of an actor and what it is to do:

  NAME start PATH                   a new process opens the file, which it makes if need be: ready PID
  NAME lock HOW START LEN           asking, then acquired | denied | interrupted | failed ERROR
  NAME unlock HOW START LEN         releasing, then released | failed ERROR
  NAME test HOW START LEN           free | conflict shared|exclusive START LEN PID
  NAME close                        closes the file: releasing, then released
  NAME settle                       answered, or blocked once the request waits for somebody's lock
  NAME signal NUMBER                to the process: signalled

HOW is fcntl or flock, shared or exclusive, and now or wait, joined by commas; LEN 0 is "to the
end". A SIGINT interrupts a wait. "ended STATUS" follows the end of an actor's process.

With "traffic", workers lock random ranges of the file until a line of input comes or the time is
over. The file is a row of counters. Who holds an exclusive lock adds one to each counter that it
covers; who holds a shared lock looks twice, and says "torn" if it saw a change. No cache of the
client lies between, so a lock held twice shows without any clock. Each worker says

  held HOW START LEN ASKED ACQUIRED RELEASING RELEASED PATH    once for each lock it had
  denied | interrupted                                         for each that it did not get
  failed ERROR                                                 once, and ends
  counted N...                                                 at its end, what it added to each
"""
import errno, fcntl, mmap, os, random, selectors, signal, struct, sys, time

COUNTERS = 8
DIGITS = 8
HOLD_SECONDS_MAX = 0.008
PATIENCE_SECONDS_MAX = 0.06
FLUSH_SECONDS = 0.2
SETTLE_SECONDS = 0.005
OUR_FD_MAX = 2
ANSWERED, TOLD, ASKING = 0, 1, 2        # how far an actor is with a lock


class Interrupted(Exception):
    pass


def interrupt(*_):
    raise Interrupted


def say(name, *words):
    """One write, so that lines of several processes do not mix."""
    line = ' '.join(map(str, (f'{time.time():.6f}', name, *words)))
    os.write(1, line.encode() + b'\n')


def apply(fd, how, start, length, release=False):
    """Takes or drops a lock."""
    words = how.split(',')
    operation = fcntl.LOCK_SH if 'shared' in words else fcntl.LOCK_EX
    if release:
        operation = fcntl.LOCK_UN
    elif 'wait' not in words:
        operation |= fcntl.LOCK_NB
    if 'flock' in words:
        fcntl.flock(fd, operation)
    else:
        fcntl.lockf(fd, operation, length, start)


def error_name(err):
    return errno.errorcode.get(err.errno, err.errno)


def is_conflict(err):
    return err.errno in (errno.EAGAIN, errno.EACCES)


# Actors.

def find_conflict(fd, how, start, length):
    """What F_GETLK says of a lock that somebody could ask for."""
    form = 'hhqqi0q'            # struct flock
    kind = fcntl.F_RDLCK if 'shared' in how else fcntl.F_WRLCK
    asked = struct.pack(form, kind, os.SEEK_SET, start, length, 0)
    kind, _, start, length, pid = struct.unpack(form, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return ['free']
    return ['conflict', 'shared' if kind == fcntl.F_RDLCK else 'exclusive', start, length, pid]


def act(name, path, commands, asks):
    """The life of an actor; it has the file and nothing else of the others."""
    signal.signal(signal.SIGINT, interrupt)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    say(name, 'ready', os.getpid())
    for line in commands:
        verb, *args = line.split()
        if verb == 'close':
            say(name, 'releasing')
            os.close(fd)
            say(name, 'released')
            continue
        how, start, length = args[0], int(args[1]), int(args[2])
        try:
            if verb == 'lock':
                say(name, 'asking')
                asks[0] = ASKING
                apply(fd, how, start, length)
                answer = ['acquired']
            elif verb == 'unlock':
                say(name, 'releasing')
                apply(fd, how, start, length, release=True)
                answer = ['released']
            else:
                answer = find_conflict(fd, how, start, length)
        except Interrupted:
            answer = ['interrupted']
        except OSError as err:
            answer = ['denied'] if is_conflict(err) else ['failed', error_name(err)]
        asks[0] = ANSWERED
        say(name, *answer)


class Actor:
    def __init__(self, name, path):
        self.name = name
        self.asks = mmap.mmap(-1, 1)    # shared with the process
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.dup2(reader, 0)
            os.closerange(OUR_FD_MAX + 1, 1024)
            try:
                act(name, path, sys.stdin, self.asks)
            except OSError as err:
                say(name, 'failed', error_name(err))
            os._exit(0)
        os.close(reader)
        self.commands = writer
        self.end = os.pidfd_open(self.pid)

    def is_asleep(self):
        """Waiting for an answer on the network is an uninterruptible sleep, waiting for somebody
        to unlock is not."""
        with open(f'/proc/{self.pid}/stat', 'rb') as stat:
            return stat.read().rsplit(b')', 1)[1].split()[0] == b'S'

    def settled(self):
        if self.asks[0] == ANSWERED:
            return 'answered'
        if self.asks[0] == ASKING and self.is_asleep() and self.asks[0] == ASKING:
            return 'blocked'
        return None


def direct():
    """Does what the lines of input say."""
    actors, settling = {}, []
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    rest = b''

    def obey(line):
        name, verb, *args = line.split()
        if verb == 'start':
            actor = actors[name] = Actor(name, args[0])
            selector.register(actor.end, selectors.EVENT_READ, actor)
        elif verb == 'settle':
            settling.append(actors[name])
        elif verb == 'signal':
            say(name, 'signalled')
            os.kill(actors[name].pid, int(args[0]))
        else:
            if verb == 'lock':
                actors[name].asks[0] = TOLD
            os.write(actors[name].commands, (' '.join([verb, *args]) + '\n').encode())

    while True:
        for key, _ in selector.select(SETTLE_SECONDS if settling else None):
            if key.data:
                actor = key.data
                _, status = os.waitpid(actor.pid, 0)
                selector.unregister(actor.end)
                os.close(actor.end)
                os.close(actor.commands)
                settling = [other for other in settling if other is not actor]
                say(actor.name, 'ended', os.waitstatus_to_exitcode(status))
                continue
            data = os.read(0, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b'\n')
            for line in lines:
                obey(line.decode())
        for actor in list(settling):
            state = actor.settled()
            if state:
                settling.remove(actor)
                say(actor.name, state)


# Traffic.

class Worker:
    def __init__(self, name, path, seed):
        self.name, self.path = name, path
        self.rng = random.Random(f'{seed}/{name}')
        self.lines, self.flushed = [], time.monotonic()
        self.counted = [0] * COUNTERS
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o666)

    def note(self, *words):
        """Says it later: a write for each lock would slow the traffic down."""
        self.lines.append(' '.join(map(str, (f'{time.time():.6f}', self.name, *words))) + '\n')
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self):
        while self.lines:       # a write of at most PIPE_BUF stays whole
            part = ''.join(self.lines[:16])
            del self.lines[:16]
            os.write(1, part.encode())
        self.flushed = time.monotonic()

    def run(self, goes_on):
        signal.signal(signal.SIGALRM, interrupt)
        try:
            while goes_on():
                self.take_one()
        except OSError as err:
            self.note('failed', error_name(err))
            return 1
        finally:
            self.note('counted', *self.counted)
            self.flush()
        return 0

    def take_one(self):
        rng = self.rng
        first = rng.randrange(COUNTERS)
        # Mostly few, so that many locks are held at a time.
        number = min(rng.choice((1, 1, 1, 2, 3, COUNTERS)), COUNTERS - first)
        length = 0 if first + number == COUNTERS and rng.random() < 0.5 else number * DIGITS
        kind = rng.choice(('shared', 'exclusive', 'exclusive'))
        patience = rng.choice(('now', 'wait', 'wait', 'wait'))
        how, start = f'fcntl,{kind},{patience}', first * DIGITS
        asked = time.time()
        try:
            if patience == 'wait' and rng.random() < 0.2:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, PATIENCE_SECONDS_MAX))
            apply(self.fd, how, start, length)
            acquired = time.time()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:     # perhaps after it was granted
            apply(self.fd, how, start, length, release=True)
            return self.note('interrupted')
        except OSError as err:
            if not is_conflict(err):
                raise
            return self.note('denied')
        if kind == 'exclusive':
            self.count(first, number)
        else:
            self.look_twice(first, number)
        releasing = time.time()
        apply(self.fd, how, start, length, release=True)
        times = (f'{t:.6f}' for t in (asked, acquired, releasing, time.time()))
        self.note('held', how, start, length, *times, self.path)

    def linger(self):
        time.sleep(self.rng.uniform(0, HOLD_SECONDS_MAX))

    def read(self, first, number):
        """The counters from the server; what was never written is 0."""
        data = os.pread(self.fd, number * DIGITS, first * DIGITS)
        cut = (data[at:at + DIGITS] for at in range(0, number * DIGITS, DIGITS))
        return [int(digits.strip(b'\0') or 0) for digits in cut]

    def count(self, first, number):
        values = self.read(first, number)
        self.linger()
        data = b''.join(b'%0*d' % (DIGITS, value + 1) for value in values)
        if os.pwrite(self.fd, data, first * DIGITS) != len(data):
            raise OSError(errno.EIO, 'short write')
        for at in range(first, first + number):
            self.counted[at] += 1

    def look_twice(self, first, number):
        before = self.read(first, number)
        self.linger()
        if self.read(first, number) != before:
            self.note('torn', first, number)


def traffic(path, workers, seconds, seed):
    """Returns how many workers failed."""
    stop = mmap.mmap(-1, 1)             # shared with the workers
    end = time.monotonic() + seconds
    ends = []
    selector = selectors.SelectSelector()
    for number in range(workers):
        pid = os.fork()
        if not pid:
            os._exit(Worker(f'w{number}', path, f'{os.uname().nodename}/{seed}').run(
                lambda: not stop[0] and time.monotonic() < end))
        ends.append(pid)
    selector.register(0, selectors.EVENT_READ)
    selector.select(seconds)
    stop[0] = 1
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in ends)


def main():
    args = sys.argv[1:]
    if args == ['actors']:
        direct()
    elif args[:1] == ['traffic'] and len(args) == 5:
        _, path, workers, seconds, seed = args
        sys.exit(traffic(path, int(workers), float(seconds), seed))
    else:
        sys.exit(__doc__)


main()

"""One of N: which worker of a server does what only one of them may do.

A *lease* has a name, and at most one holder among all workers of the server until it runs out.  The holder renews it each
time that its timer is due; the others ask each time that theirs is.  So another one takes over

- within one interval when the holder has died: the parent takes its leases away at once;
- within one interval when it is told to stop (a reload, a recycling): it gives them back and gets no new ones;
- when it hangs, as soon as its lease has run out, which is a little later than its next tick is due: no more than one
  tick of another phase is left out.

A lease is one word of the status board, exchanged atomically, with its holder and its end in it; there is no lock that
a process could take along when it dies.  Times are those of the system's monotonic clock, which all processes of a machine
share; a clock that is set does not matter.

What a lease cannot do: a holder that hangs in the middle of a tick and goes on after its lease has run out does not know.
Where that matters, ask :meth:`Lease.held` just before the effect, or let the effect itself refuse a second one.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from typing import TYPE_CHECKING, Any

from .._aiotools import _word_swap

if TYPE_CHECKING:
    from .worker import Worker

__all__ = ("Lease", "Leases", "lease")

#: A word: the holder above (22 bits), the end in milliseconds below.
_END_BITS = 42
_END_MASK = (1 << _END_BITS) - 1
_USE_BITS = 12


def owner_of(slot: int, use: int) -> int:
    """The mark of the child that has *slot* as the *use*-th one; never 0."""
    return slot << _USE_BITS | use % ((1 << _USE_BITS) - 1) + 1


def release_all(words: Any, owner: int) -> None:
    """Take its leases away from *owner*, who is gone."""
    for i in range(1, len(words), 2):
        word = words[i]
        if word >> _END_BITS == owner:
            _word_swap(words, i, word, 0)


def _now() -> int:
    return time.monotonic_ns() // 1_000_000


class Lease:
    """The right to do what *name* stands for, as one worker sees it.

    :ivar name: its name.
    :ivar interval: seconds between two times at which :meth:`acquire` is called by each worker.
    """

    def __init__(self, leases: Leases | None, name: str, interval: float, jitter: float) -> None:
        self.name = name
        self.interval = interval
        self._leases = leases
        self._place = -1 if leases is None else leases._place_of(name)
        # Later than the holder's next tick, by as much as a busy loop is late.
        self._length = int((interval + jitter + max(0.02, min(0.1 * interval, 1.0))) * 1000) + 1

    def __repr__(self) -> str:
        return f"<Lease {self.name!r} {'held' if self.held() else 'not held'}>"

    def acquire(self) -> bool:
        """Take it, or renew it; says whether it is this worker's now.

        Also False in a worker that was told to stop.  Always true outside a server.
        """
        leases = self._leases
        if leases is None:
            return True
        if leases._words is None:
            return False
        if leases._worker.stopping:
            self.release()
            return False
        word = leases._words[self._place]
        now = _now()
        owner, end = word >> _END_BITS, word & _END_MASK
        if owner not in (0, leases._owner) and now < end:
            return False
        mine = leases._owner << _END_BITS | now + self._length & _END_MASK
        return bool(_word_swap(leases._words, self._place, word, mine))

    def held(self) -> bool:
        """Whether it is this worker's, and has not run out."""
        leases = self._leases
        if leases is None:
            return True
        if leases._words is None:
            return False
        word = leases._words[self._place]
        return bool(word >> _END_BITS == leases._owner and _now() < word & _END_MASK)

    def release(self) -> None:
        """Give it back, if it is this worker's."""
        leases = self._leases
        if leases is None or leases._words is None:
            return
        word = leases._words[self._place]
        if word >> _END_BITS == leases._owner:
            _word_swap(leases._words, self._place, word, 0)

    def close(self) -> None:
        """Give it back for good: the name may be used again in this worker."""
        self.release()
        if self._leases is not None:
            self._leases._names.discard(self.name)


class Leases:
    """Those of one worker.

    The table is a list of pairs of words: a hash of the name (0: free), and the lease.
    """

    def __init__(self, words: Any, owner: int, worker: Worker) -> None:
        self._words = words
        self._owner = owner
        self._worker = worker
        self._names: set[str] = set()

    def lease(self, name: str, interval: float, jitter: float = 0.0) -> Lease:
        if name in self._names:
            raise ValueError(f"singleton {name!r} is in use in this worker already")
        found = Lease(self, name, interval, jitter)
        self._names.add(name)
        return found

    def _place_of(self, name: str) -> int:
        """The index of the word for *name*, which is given one if it is new."""
        words = self._words
        if words is None:
            raise RuntimeError("the worker has ended")
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest, "little") or 1
        places = len(words) // 2
        for i in range(places):
            at = 2 * ((key + i) % places)
            if words[at] == key or (words[at] == 0 and _word_swap(words, at, 0, key)) or words[at] == key:
                return at + 1
        raise RuntimeError(f"a server can have {places} names of singletons; {name!r} is one too many")

    def close(self) -> None:
        """At the end of the worker."""
        words, self._words = self._words, None
        if words is not None:
            # A thread that was given up may end after the server did, and then there is nothing left to release.
            with contextlib.suppress(ValueError):
                release_all(words, self._owner)


def lease(name: str, interval: float, jitter: float = 0.0) -> Lease:
    """The lease *name* of the server that the calling code runs in; outside a server one that is always held.

    :param name: the same in all workers.
    :param interval: seconds between two calls of :meth:`Lease.acquire`, in each worker.
    :param jitter: seconds by which such a call may come later than that.
    :raises TypeError: *name* is no str, or *interval* no number.
    :raises ValueError: *interval* is not positive and finite, or the name is in use in this worker.
    :raises RuntimeError: too many names.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a singleton must be a str, not {type(name).__name__!r}")
    if isinstance(interval, bool) or not isinstance(interval, (int, float)):
        raise TypeError(f"interval must be a number of seconds, not {interval!r}")
    if not 0 < interval < math.inf:
        raise ValueError(f"a singleton needs an interval of more than 0 seconds, not {interval!r}")
    from .worker import current_worker

    try:
        leases = current_worker()._leases
    except LookupError:
        leases = None
    return Lease(None, name, interval, jitter) if leases is None else leases.lease(name, interval, jitter)
